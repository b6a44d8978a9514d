"""Hydra configuration groups; Hydra finds them as pkg://dynrank.conf."""
