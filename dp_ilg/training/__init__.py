"""A private training loop for any framework: the front door, and its parts.

Floor 5: imports what lies below the public names; `lora` and `fine_tune` need Flax, and
all others import an extra only where it is used.
Enter by `loop.front.private_training`, or by its parts: `step.make_train_step`,
`feeds.Feed`, `mesh.spread`, `fine_tune.tune` and `lora`.
"""
