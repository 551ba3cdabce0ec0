"""One node leads, the others join: who there is, what they say to each other, and one training on all of them."""
