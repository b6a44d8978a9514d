"""Carrying out a rank schedule in a training run, with any trainer."""
