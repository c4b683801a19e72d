"""OpenAI's guided-diffusion (ADM) checkpoints as diffusers networks."""
