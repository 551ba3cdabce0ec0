"""From blocks to models and adapters: the launcher, the worker, and the stages that start them."""
