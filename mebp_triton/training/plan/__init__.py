"""``mebp plan`` and ``--memory-budget``: the peak of a run predicted, and settings chosen that stay inside."""
