"""Training text: files become token rows, and rows become batches, in an order that a resumed run repeats.

``sources`` reads files. ``text``, ``rows`` and ``chat`` make tokens and masks of what they hold; ``messages`` and
``template`` know what chat messages and chat templates look like. ``tokenized`` keeps tokens in memory or in a file,
``packing`` puts several rows into one, and ``batching`` orders and pads them.
"""
