"""Pretrained models known by a short name: the table of them, how they are fetched, the folders they are kept in."""
