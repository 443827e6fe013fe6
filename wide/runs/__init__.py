"""What identifies a run, and its folder: files, checkpoints, claims.

May import no other room.
"""
