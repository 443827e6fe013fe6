"""The paper's networks, their published draws, and what scripts need to know of each rule.

May import runs.
"""
