"""The front door: loss, optimizer and plan in one object that hands out charged lots.

Floor 5: imports what lies below the public names, and an extra only where it is used.
Enter by `front.private_training`, `state.PrivateState` and `lots.Lot`.
"""
