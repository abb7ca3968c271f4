"""The verbs about rewards: rewards."""


def rewards() -> None:
    """List the rewards that have names, where their weights come from and under which licences.

    marval rewards

    marval finetune fashion-student --reward classifier=1,my_rewards:brightness=0.5 --out runs/tuned
    """
    from marval.rewards import KNOWN

    for name, about in KNOWN.items():
        print(f"{name}: {about.what}\n    weights {about.source}; {about.licence}")
    print("module:function: your own, called with images in [0, 1] and prompts; one number per image, differentiable")
    print("\nWeights come from the hub or its cache. From elsewhere: NAME:FOLDER or NAME:HUB-ID. With factors:")
    print("    --reward pickscore=1,clip:openai/clip-vit-base-patch32=0.5,my_rewards:brightness=0.1")
