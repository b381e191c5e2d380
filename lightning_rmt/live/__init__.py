"""Everything that touches the running LightningModule: the fence, its loss, its batches, the ranks, the schedule."""
