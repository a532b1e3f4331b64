"""Features of images that learn nothing from them: wavelets, patches of photographs.

Floor 8: imports what `experiments.data` may import.
Enter by `scattering.scattering_features`, `patches.PATCH_FEATURES` and
`photographs.photographs`.
"""
