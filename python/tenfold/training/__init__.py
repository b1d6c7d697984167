"""What the methods' trainers share: batches, the work folder, and one loop over accelerate."""
