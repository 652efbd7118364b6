"""Models: a file's name is the model's name on the command line; its `build` returns an `nn.Module`.

`forward` takes a batch's `input` and returns logits, or anything with `.logits`. Models also run on meta tensors,
since layers and plans are traced there.
"""
