"""Checks of the data of `fit`, `evaluate` and `predict`, where Keras has not changed them yet."""

from typing import Any

import keras
import tensorflow as tf

from elita_tf.data.tokenizer_base import texts_of
from elita_tf.models.carried_state import CarriedState
from elita_tf.models.inputs import require_ids, require_inputs
from elita_tf.models.preprocessor import require_no_labels


class CheckedData:
    """Mixin of a KerasHub task with a `preprocessor` and a `carried_state`, or None for either."""

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in KerasHub. Data that would train on something else are refused.

        Raises:
            ValueError: `class_weight`; anything but texts where there is a preprocessor; batches
                with another number of rows than the carried state.
        """
        _refuse_class_weight(kwargs)
        x, y, sample_weight = self._checked(x, y, sample_weight)
        if isinstance(validation_data, list | tuple):
            validation_data = keras.utils.unpack_x_y_sample_weight(validation_data)
            validation_data = self._checked(*validation_data)
        if self.carried_state is not None:
            # As in KerasHub, data for the validation come before a share of the others.
            share = 0 if validation_data is not None else validation_split or 0
            x = _in_equal_batches(self.carried_state, x, batch_size, share)
        try:
            return super().fit(
                x,
                y,
                batch_size,
                sample_weight,
                validation_data=validation_data,
                validation_split=validation_split,
                **kwargs,
            )
        except tf.errors.InvalidArgumentError as error:
            if self.carried_state is not None and self.carried_state.advice in str(error):
                raise ValueError(self.carried_state.advice) from error
            raise

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, y, sample_weight = self._checked(x, y, sample_weight)
        return super().evaluate(x, y, batch_size, sample_weight, **kwargs)

    def predict(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._checked(x)[0], *args, **kwargs)

    def train_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_class_weight(kwargs)
        return super().train_on_batch(x, *args, **kwargs)

    def preprocess_samples(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        if self.preprocessor is None:
            return super().preprocess_samples(x, y, sample_weight)
        if isinstance(x, str | bytes) or getattr(x, "shape", None) == ():
            raise ValueError(
                f"{self.name} trains on batches of texts; received a single text. Batch the "
                "dataset, as in dataset.batch(8), or put the text into a list."
            )
        # Beside weights, the labels are a placeholder.
        y = y if sample_weight is None else None
        return super().preprocess_samples(x, y, sample_weight)

    def _checked(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """The same data. Weights of texts are in the place of labels too.

        Keras drops weights where there are no labels.
        """
        if self.preprocessor is None:
            self._require_arrays(x, y)
            return x, y, sample_weight
        # NumPy would make strings of None and NaN beside strings. Datasets have dtypes.
        if isinstance(x, list | tuple | str | bytes) or hasattr(x, "__array__"):
            texts_of(x)
        require_no_labels(y)
        return x, sample_weight, sample_weight

    def _require_arrays(self, x: Any, y: Any) -> None:
        """Raises a ValueError for arrays that a graph would misread or refuse less clearly."""
        tensors = x.values() if isinstance(x, dict) else [x]
        if not all(hasattr(tensor, "__array__") for tensor in tensors):
            return  # a dataset, or what Keras says something of
        is_own_loss = getattr(self, "loss", None) is None
        labels = {"labels": y} if is_own_loss and hasattr(y, "__array__") else {}
        require_inputs(self.name, x, **labels)
        require_ids(self.name, self.vocabulary_size, token_ids=x["token_ids"], **labels)


def _refuse_class_weight(arguments: dict[str, Any]) -> None:
    if arguments.get("class_weight") is not None:
        raise ValueError(
            "`class_weight` would weigh every row by one number, and each of its labels is a class "
            f"of its own; received {arguments['class_weight']!r:.60}. Weigh the labels: "
            "sample_weight=np.vectorize(lambda label: class_weight.get(label, 1.0))(labels)."
        )


def _in_equal_batches(
    state: CarriedState, x: Any, batch_size: int | None, validation_split: float
) -> Any:
    """The data, with a ValueError for a batch of other rows, now or when it comes."""
    if hasattr(x, "map"):  # A dataset of TensorFlow or of grain.

        def checked(*element: Any) -> Any:
            first = tf.nest.flatten(element)[0]
            element = element if len(element) > 1 else element[0]
            state.require_rows(first.shape[0])
            if first.shape[0] is not None:
                return element
            is_equal = tf.debugging.assert_equal(tf.shape(first)[0], state.batch_size, state.advice)
            with tf.control_dependencies([is_equal]):
                return tf.nest.map_structure(tf.identity, element)

        return x.map(checked)
    num_rows = len(next(iter(x.values())) if isinstance(x, dict) else x)
    num_rows = int(num_rows * (1 - validation_split))
    batch_size = batch_size or 32
    for rows in {min(num_rows, batch_size), num_rows % batch_size} - {0}:
        state.require_rows(rows)
    return x
