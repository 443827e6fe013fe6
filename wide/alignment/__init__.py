"""Pairs of networks and their alignment scores."""
