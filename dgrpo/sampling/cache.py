"""Keys and values of a whole canvas, of which a window is recomputed (Fast-dLLM, arXiv:2505.22618)."""

from torch import Tensor


class WindowCache:
    """A key-value store with transformers' `update` call: fill it with one full pass, then overwrite a window.

    Inside a window the network sees fresh keys and values of the window's positions and stored ones elsewhere. With
    bidirectional attention the stored ones are out of date as soon as a token is committed: an approximation.
    """

    def __init__(self):
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.window: slice | None = None
        self.age = 1  # passes since the stored ones were computed, that pass included

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, [B, heads, L, head_dim], with this window's own put in place."""
        if self.window is None:
            self.keys[layer_idx], self.values[layer_idx] = key, value
        else:
            self.keys[layer_idx][:, :, self.window] = key
            self.values[layer_idx][:, :, self.window] = value
        return self.keys[layer_idx], self.values[layer_idx]

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: a pass over distinct rows serves all of their copies."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]
