"""A model from another one's weights: transforms, a file each, `apply(model, config) -> (model, report)`."""

from moekit.upcycle import copies as copies
