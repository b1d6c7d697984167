# SPDX-License-Identifier: Apache-2.0
"""What the methods' trainers share: batches, the work folder, and one loop over accelerate."""
