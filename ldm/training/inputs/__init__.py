"""What training runs see of a data set: samples drawn by their global index, with captions and tensors."""
