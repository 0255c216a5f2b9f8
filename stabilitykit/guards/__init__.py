"""The eight guards: parts that keep a training run alive, each usable alone in any loop, or together as `Guards`."""

from stabilitykit.guards.batch_norm import BatchNormFreeze, freeze_batch_norm, train_eval_gap
from stabilitykit.guards.buffer import BufferSanitiser
from stabilitykit.guards.checks import Problem, all_finite, finite_rows, gradient_norm, label_problem
from stabilitykit.guards.clipping import GradientClip
from stabilitykit.guards.guard import Guard
from stabilitykit.guards.guards import Guards
from stabilitykit.guards.isolation import Isolation, isolated
from stabilitykit.guards.learning_rate import LearningRateSchedule
from stabilitykit.guards.precision import MixedPrecision
from stabilitykit.guards.replay_weights import AdaptiveReplayWeights
from stabilitykit.guards.shares import cosine_over_tasks, linear_to_half, unchanged
from stabilitykit.guards.validation import StepValidation

__all__ = [
    "AdaptiveReplayWeights",
    "BatchNormFreeze",
    "BufferSanitiser",
    "GradientClip",
    "Guard",
    "Guards",
    "Isolation",
    "LearningRateSchedule",
    "MixedPrecision",
    "Problem",
    "StepValidation",
    "all_finite",
    "cosine_over_tasks",
    "finite_rows",
    "freeze_batch_norm",
    "gradient_norm",
    "isolated",
    "label_problem",
    "linear_to_half",
    "train_eval_gap",
    "unchanged",
]
