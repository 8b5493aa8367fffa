"""Joint models (MMDiT): SD 3 and 3.5, Flux.1, Qwen-Image.

Text and image share one softmax, and the text's state changes with every block, step and image. A text that was not in
the prompt has no keys there: the model must run it with the image (`stream`). `maps` holds the formulae, `families`
what is particular to a model, `reading` which passes are stored and re-run, `record` what is known of an image.
"""
