"""What the callback needs from transformers' Trainer."""
