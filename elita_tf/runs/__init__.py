"""Training runs: recipes, run folders, and what is made of a trained run.

The same is a command: see `elita --help`.
"""

from elita_tf.runs.assembly import TrainingSetup, assemble, load_run
from elita_tf.runs.evaluation import evaluate
from elita_tf.runs.recipe import Recipe, load_recipe, recipe_names
from elita_tf.runs.training import train

__all__ = [
    "Recipe",
    "TrainingSetup",
    "assemble",
    "evaluate",
    "load_recipe",
    "load_run",
    "recipe_names",
    "train",
]
