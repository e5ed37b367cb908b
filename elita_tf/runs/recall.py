"""Multi-query associative recall (MQAR): a task of looking up, as in Zoology (arXiv:2312.04927).

A sequence begins with pairs of a key and a value. Later every key appears once more, and the model
predicts the value that followed the key at its first appearance:

    k1 v1 k2 v2  ...  k2 (v2)  ...  k1 (v1)  ...

Softmax attention can solve this task exactly. The results of other models are therefore meaningful
only if softmax attention reaches an accuracy of at least 95 %.

A model needs two blocks. The first lets a position know the token before it, so that the position
of a value knows its key. The second looks the key up. Softmax attention with rotary positions finds
the position before only slowly: two such blocks, at a rate of 3e-3, had 14 % after 2,800 steps of
32 examples. In the later experiments of Zoology's authors a short convolution is therefore the
first block of all models. Here it is attention over a window of two positions, or gated
`Attention2`.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from elita_tf.models import ElitaBackbone, ElitaCausalLM, register_mixer, registry
from elita_tf.ops import linear_cross_entropy

# The distance to the second appearance of a key follows a power law: the i-th possible place has
# the weight i^(_POWER - 1), so most keys appear again soon.
_POWER = 0.01
# All models have the feed-forward of the softmax baseline, with a small inner dimension. The models
# of Zoology have no feed-forward.
_SHARED = {"num_layers": 2, "feed_forward": "swiglu", "feed_forward_options": {"inner_dim": 64}}
# The name of softmax over a window of two positions.
_BEFORE = "softmax_over_two"
# Softmax has one head, as in Zoology, because RoPE rotates half of a head's features too fast for a
# comparison of keys. GLA has two heads, half of its usual number, because its state holds
# width^2 / (2 * heads) numbers.
_NUM_HEADS = {"attention2_gated": 8, "gla": 2, "softmax": 1}
MODELS: dict[str, list[str]] = {
    "gated": [_BEFORE, "attention2_gated"],
    "gla": [_BEFORE, "gla"],
    "softmax": [_BEFORE, "softmax"],
    "gated and gla": ["attention2_gated", "gla"],
    "gated and softmax": ["attention2_gated", "softmax"],
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of the task and of its training.

    The numbers of pairs take turns from example to example. The size of a batch is a multiple of
    their count, so all batches have the same number of labels.
    """

    vocabulary_size: int = 8_192
    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    training_examples: int = 100_000
    validation_examples: int = 1_000
    test_examples: int = 3_000
    hidden_dim: int = 64
    models: tuple[str, ...] = tuple(MODELS)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    batch_size: int = 40
    warmup_steps: int = 200
    steps_per_loss: int = 100  # a recorded loss is a mean over this many steps
    seed: int = 0
    jit_compile: bool | str = "auto"

    @property
    def steps(self) -> int:
        """Every training example is used once."""
        return self.training_examples // self.batch_size

    @property
    def labels_per_batch(self) -> int:
        return self.batch_size // len(self.pairs) * sum(self.pairs)


FULL = Plan()
SHORT = Plan(
    vocabulary_size=512,
    length=64,
    pairs=(4, 8),
    training_examples=25_600,
    validation_examples=200,
    test_examples=600,
    rates=(3e-3,),
    batch_size=64,
    warmup_steps=40,
)


class Case(NamedTuple):
    """A model and the learning rate of its training."""

    plan: Plan
    model: str
    rate: float

    @property
    def name(self) -> str:
        return f"recall,{self.model.replace(' ', '-')},rate={self.rate:g}"


class Data(NamedTuple):
    """Arrays of shape (examples, length). A label counts where its weight is 1."""

    token_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class QueriesCausalLM(ElitaCausalLM):
    """An ElitaCausalLM that computes logits only at the positions with a label.

    The loss is the same. Most positions have no label, and the logits of all positions would take
    most of a step's time.

    Args:
        backbone: the decoder.
        num_labels: the number of labels in a batch.
    """

    def __init__(self, backbone: ElitaBackbone, num_labels: int) -> None:
        super().__init__(backbone)
        self.num_labels = num_labels

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        weights, positions = ops.top_k(ops.reshape(sample_weight, (-1,)), self.num_labels)
        hidden_states = self.backbone(x, training=training)
        hidden_states = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
        hidden_states = ops.take(hidden_states, positions, axis=0)
        labels = ops.take(y, positions)  # of all examples, one after the other
        return linear_cross_entropy(hidden_states, self.backbone.output_kernel, labels, weights)


def cases(plan: Plan) -> list[Case]:
    """Every model at every rate."""
    return [Case(plan, model, rate) for model in plan.models for rate in plan.rates]


def run(case: Case) -> dict[str, Any]:
    """Trains one model and returns its figures. The validation accuracy selects the best rate."""
    plan, start = case.plan, time.perf_counter()
    keras.utils.clear_session()
    keras.utils.set_random_seed(plan.seed)
    training, validation, test = splits(plan)
    model = build(case)
    losses = train(model, training, plan)
    validation_accuracy = accuracies(predict(model, validation), validation)["all"]
    tested = accuracies(predict(model, test), test)
    return {
        "task": dataclasses.asdict(plan),
        "model": case.model,
        "rate": case.rate,
        "steps": plan.steps,
        "parameters": model.count_params(),
        "validation_accuracy": validation_accuracy,
        "test_accuracy": tested.pop("all"),
        "test_accuracy_by_pairs": tested,
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


# === Data ===
@functools.lru_cache(maxsize=1)
def splits(plan: Plan) -> tuple[Data, Data, Data]:
    """Examples for training, validation and test, the same for every model."""
    sizes = (plan.training_examples, plan.validation_examples, plan.test_examples)
    task = (plan.length, plan.vocabulary_size, plan.pairs)
    generators = np.random.default_rng(plan.seed).spawn(len(sizes))
    return tuple(examples(num, *task, rng) for num, rng in zip(sizes, generators, strict=True))


def examples(
    num: int, length: int, vocabulary: int, pairs: Sequence[int], rng: np.random.Generator
) -> Data:
    """Examples whose weights are 1 where a key appears for the second time, and 0 elsewhere.

    The numbers of pairs are pairs[0], pairs[1] and so on, and after the last pairs[0] again. Keys
    are from the first half of the vocabulary and values from the second half. The pairs of an
    example have different keys and different values. A key can appear again at every other
    position after the pairs. The positions that are left hold random tokens, which are not among
    the keys of the example.
    """
    longest = max(pairs)
    if length < 4 * longest or vocabulary < 2 * longest:
        raise ValueError(
            f"{longest} pairs need a length of at least {4 * longest} and a vocabulary of "
            f"{2 * longest}; received {length} and {vocabulary}."
        )
    half, vocabulary_ids = vocabulary // 2, np.arange(vocabulary)
    data = Data(*(np.zeros((num, length), dtype) for dtype in ("int32", "int32", "float32")))
    for token_ids, labels, weights, count in zip(*data, np.resize(pairs, num), strict=True):
        keys = rng.choice(half, count, replace=False)
        values = half + rng.choice(vocabulary - half, count, replace=False)
        token_ids[:] = rng.choice(np.delete(vocabulary_ids, keys), length)
        token_ids[0 : 2 * count : 2], token_ids[1 : 2 * count : 2] = keys, values
        queries = 2 * count + 2 * places((length - 2 * count) // 2, count, rng)
        token_ids[queries], labels[queries], weights[queries] = keys, values, 1
    return data


def places(num_places: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `count` different numbers below `num_places`; small numbers are more likely."""
    likelihood = np.arange(1, num_places + 1) ** (_POWER - 1)
    return rng.choice(num_places, count, replace=False, p=likelihood / likelihood.sum())


# === Model ===
def build(case: Case) -> QueriesCausalLM:
    """The model of a case, compiled: Adam, with a warm-up and then a cosine to zero."""
    plan = case.plan
    sizes = {"hidden_dim": plan.hidden_dim, "context_length": plan.length}
    if _BEFORE not in registry.MIXERS:
        softmax = registry.MIXERS["softmax"].layer
        register_mixer(_BEFORE, softmax, num_heads=1, window_length=2)
    mixers = MODELS[case.model]
    heads = {name: {"num_heads": _NUM_HEADS[name]} for name in mixers if name != _BEFORE}
    backbone = ElitaBackbone(
        plan.vocabulary_size, num_heads=1, mixers=mixers, mixer_options=heads, **sizes, **_SHARED
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=plan.steps - plan.warmup_steps,
        warmup_target=case.rate,
        warmup_steps=plan.warmup_steps,
    )
    optimizer = keras.optimizers.Adam(schedule, beta_1=0.9, beta_2=0.99)
    model = QueriesCausalLM(backbone, plan.labels_per_batch)
    model.compile(optimizer, jit_compile=plan.jit_compile)
    return model


def train(model: ElitaCausalLM, data: Data, plan: Plan) -> list[list[float]]:
    """Trains the model on the examples in their order.

    Returns:
        Pairs of a step and the mean loss of the last `steps_per_loss` steps.
    """
    losses = []
    for first in range(0, plan.steps, plan.steps_per_loss):
        last = min(first + plan.steps_per_loss, plan.steps)
        rows = slice(first * plan.batch_size, last * plan.batch_size)
        token_ids, labels, weights = (array[rows] for array in data)
        inputs, how = {"token_ids": token_ids}, {"batch_size": plan.batch_size, "verbose": 0}
        history = model.fit(inputs, labels, sample_weight=weights, shuffle=False, **how)
        losses.append([last, round(history.history["loss"][0], 5)])
    return losses


# === Accuracy ===
def predict(model: ElitaCausalLM, data: Data, batch_size: int = 50) -> np.ndarray:
    """The most likely token where the weight is 1, and 0 elsewhere: (examples, length)."""
    kernel = ops.convert_to_tensor(model.backbone.output_kernel)
    predicted = np.zeros_like(data.labels)
    for first in range(0, len(predicted), batch_size):
        rows = slice(first, first + batch_size)
        hidden_states = model.backbone.predict_on_batch({"token_ids": data.token_ids[rows]})
        asked = data.weights[rows] > 0
        logits = ops.matmul(hidden_states[asked], ops.transpose(kernel))
        predicted[rows][asked] = ops.convert_to_numpy(ops.argmax(logits, axis=-1))
    return predicted


def accuracies(predicted: np.ndarray, data: Data) -> dict[str, float]:
    """The share of right predictions: of "all" examples, and by the number of pairs."""
    asked = data.weights > 0
    right, pairs = (predicted == data.labels) & asked, asked.sum(axis=1)
    shares = {str(n): right[pairs == n].sum() / asked[pairs == n].sum() for n in np.unique(pairs)}
    return {"all": float(right.sum() / asked.sum()), **{n: float(x) for n, x in shares.items()}}
