"""What is measured of LoRA layers in a window of training steps before their ranks change."""

from dynrank.change.measuring.gradient_sketch import GradientSketch
from dynrank.change.measuring.grams import Gram, Grams
from dynrank.change.measuring.sensitivity import Sensitivity
from dynrank.change.measuring.window import Needs, Window

__all__ = ["Gram", "GradientSketch", "Grams", "Needs", "Sensitivity", "Window"]
