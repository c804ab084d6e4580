"""The main job: the lesson's CNN, trained on MNIST (or on scikit-learn's small digits)."""
