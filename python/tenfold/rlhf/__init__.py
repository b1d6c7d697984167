# SPDX-License-Identifier: Apache-2.0
"""What methods on rewards and policies share: preferences, reward models and their training, sampling, evaluation."""
