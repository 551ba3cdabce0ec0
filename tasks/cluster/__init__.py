"""Groups of shards on a cluster: Ray or Dask carries them, the store alone holds what comes of them."""
