"""Alignment scores of pairs of networks.

May import models and runs.
"""
