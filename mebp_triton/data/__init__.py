"""Training text: files become token rows, rows become batches, in an order that a resumed run finds again.

``sources`` reads files. ``text``, ``rows`` and ``chat`` make tokens and masks of what they hold. ``tokenized`` keeps
them in memory or in a file, ``packing`` puts several rows into one, and ``batching`` orders and pads them.
"""
