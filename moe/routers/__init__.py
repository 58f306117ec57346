"""From activations to assignments."""
