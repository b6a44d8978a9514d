"""What is measured of LoRA layers in a window of training steps before their ranks change."""

from dynrank.statistics.gradient_sketch import GradientSketch
from dynrank.statistics.grams import METRICS, Gram, Grams
from dynrank.statistics.sensitivity import Sensitivity
from dynrank.statistics.window import Needs, Window

__all__ = ["METRICS", "Gram", "GradientSketch", "Grams", "Needs", "Sensitivity", "Window"]
