"""Training runs: recipes, run folders, and what is made of a trained run."""

from elita_tf.runs.assembly import load_run
from elita_tf.runs.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "load_run"]
