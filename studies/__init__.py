"""Studies made with membench: each folder has a study file, its records, and the words of its page in docs/studies."""
