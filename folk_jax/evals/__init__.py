"""What frozen features are worth: extracted once, then judged by the protocols beside `features`.

Nothing here knows how the features were trained.
"""
