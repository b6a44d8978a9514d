"""What the callbacks need from Lightning's Trainer."""
