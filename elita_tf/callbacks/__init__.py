"""Keras callbacks of a training run.

Those with `state` and `restore` go on where they were when `Checkpoints` resumes a run.
"""

from elita_tf.callbacks.averages import ValidateAverages
from elita_tf.callbacks.checkpoint_files import Checkpoint, newest_checkpoint
from elita_tf.callbacks.checkpoints import Checkpoints, Resumable
from elita_tf.callbacks.figures import LossPlot, MetricsFile, TrainingLog
from elita_tf.callbacks.health import Health
from elita_tf.callbacks.signals import StopOnSignal, Stopped
from elita_tf.callbacks.weights import KeepWeights

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Health",
    "KeepWeights",
    "LossPlot",
    "MetricsFile",
    "Resumable",
    "StopOnSignal",
    "Stopped",
    "TrainingLog",
    "ValidateAverages",
    "newest_checkpoint",
]
