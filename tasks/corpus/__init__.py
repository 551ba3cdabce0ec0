"""From the published archive to packed blocks and examples: no torch, no Prefect."""
