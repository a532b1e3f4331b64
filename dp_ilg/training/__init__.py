"""Parts of a private training loop of your own, for any framework.

Floor 6: imports the public names of `dp_ilg`; Flax only here and above.
Enter by `step.make_train_step`, `step.nnx_step`, `feeds.Feed`, `mesh.spread`,
`fine_tune.tune` and `lora`.
"""
