"""Themis: a reward model that calls tools, writes down what it found, and then scores."""
