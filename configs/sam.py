"""SAM: a mask for any prompt, clicks, boxes or a coarse mask, and from a grid of clicks all masks of a picture.

Paper
  Kirillov, Mintun, Ravi, Mao, Rolland, Gustafson, Xiao, Whitehead, Berg, Lo, Dollar, Girshick, 2023, Segment anything,
  arXiv:2304.02643. Code and weights: facebookresearch/segment-anything; facebook/sam-vit-* on the Hugging Face hub
  (`vgen.load`).

Parts
  sam        SAM (models/sam.py): a ViT with windows on the picture, once; prompts and masks in models/sam_decoder.py;
             objective tasks/segment.py: first a point or a box, then clicks where the mask is wrong
  engine     (scale `engine`) start, assisted, semi, automatic: the data engine (engine.py) with a simulated annotator;
             each stage is trained on masks that were made with the network of the one before

Commands
  python -m vgen.main --config=configs/sam.py --workdir=runs/sam
  (objects, and masks after one click and three: runs/sam/sam/pictures)
  Mean IoU after one click, three clicks and a box, and recall of automatic masks (metrics/segment_eval.py):
  python -m vgen.main --config=configs/sam.py --workdir=runs/sam --mode=eval
  Told in words by a CLIP that is trained first, and mean IoU of objects by "a red circle":
  python -m vgen.main --config=configs/sam.py:text --workdir=runs/sam_text
  The three stages of the data engine, with masks per picture of each:
  python -m vgen.main --config=configs/sam.py:engine --workdir=runs/engine
  SA-1B as published, from its folder of pictures and annotations:
  python -m vgen.main --config=configs/sam.py:paper --workdir=DIR --config.stages.sam.data.source=sa1b:FOLDER

Published numbers
  Parameters of the image encoder: B 89.7M, L 308.3M, H 637.0M; of the prompt encoder 6220, of the mask decoder 4.06M.
  SA-1B: 11M pictures, 1.1G masks, 99.1 % made without an annotator. Masks per picture while they were made: 20 to 44
  with clicks, 72 with confident masks drawn ahead, about 100 automatically.

Measured numbers
  mini (1500 steps of 16; 19 minutes of one CPU core beside other work), 256 held-out pictures of 1 to 3 objects that
  may hide one another: mean IoU 0.961 after one click, 0.970 after three, 0.962 by a box.  Automatic masks of 64 of
  them, 8 points a side: recall 0.993 at an IoU of 0.75, precision 0.961, 3.2 masks a picture of 2.1 objects.
  engine (400, 400, 400, 600 steps; 23 minutes of the same), masks a picture that its stages begin with: 1 drawn by
  hand, 1.78 by clicks, 4.39 (3.38 of them objects) with confident masks drawn ahead, 5.89 (3.40 objects, of 3.49 that
  there are) automatically.  The network at its end, which learned from no other masks: 0.904 after one click, 0.913
  after three; automatic recall 0.974, precision 0.814.
  text (1000 steps of the CLIP, 2500 of SAM; 19 minutes of one CPU core beside other work), objects of which there is
  one such in a picture of several, 421 of them: mean IoU by "a red circle" alone 0.902, by the words for another object
  there 0.028.  By one click 0.948, three 0.958, a box 0.949.  Where the CLIP had seen no close-ups, of whose vectors
  SAM learns, it told 0.18 of the crops' classes (0.99 of whole scenes'), and SAM did not listen: 0.37 and 0.35.
"""

from ml_collections import ConfigDict

from vgen import recipes

SCALES = ("tiny", "mini", "text", "engine", "small", "paper")

PUBLISHED = dict(
    encoder=dict(base=89_670_912, large=308_278_272, huge=637_026_048), prompts=6_220, decoder=4_058_340,
    sa1b=dict(pictures=11_000_000, masks=1_100_000_000),
)  # fmt: skip


def get_config(scale: str = "mini") -> ConfigDict:
    """The config of one scale: tiny (tests), mini, text and engine (two CPU cores, minutes), small (one
    accelerator) or paper.
    """
    makers = dict(tiny=_tiny, mini=_mini, text=_text, engine=_engine, small=_small, paper=_paper)
    return recipes.system("sam", scale, makers, PUBLISHED)


def _task(size, net, **kwargs):
    """Spec of Segment.  net: arguments of SAM, but for image_size.  kwargs: of Segment."""
    network = dict(target="vgen.models.sam:SAM", image_size=size, **net)
    return dict(target="vgen.tasks.segment:Segment", network=network, **kwargs)


def _stage(*, size, world, eval_count, net, train, task, cached=0):
    """Training on scenes and all their masks.  train: of `recipes.train`.  task: settings of Segment."""
    masks = dict(masks=True)
    seen, held = recipes.scenes(size, world, cached=cached), recipes.held_out(world, eval_count)
    seen, held = (data | dict(options=data["options"] | masks) for data in (seen, held))
    return dict(
        task=_task(size, net, **task), data=seen | dict(text=False), evaluate=held, train=recipes.train(**train),
    )  # fmt: skip


def _quality(world, **kwargs):
    return dict(target="vgen.metrics.segment_eval:SegmentQuality", world=world, **kwargs)


# ------------------------------------------------------------------------------------------------------ small worlds

# Of mini: one to three objects of four shapes and two sizes, some behind others, without textures. A pixel of a mask
# is one of the picture.
WORLD = recipes.FREE | dict(max_objects=3, sizes=("medium", "large"), occlusion=True)
NET = dict(depth=4, width=128, heads=4, global_layers=(1, 3), patch=4, window=4, channels=96, mask_channels=16,
           decoder_heads=4, decoder_mlp_dim=192, iou_dim=96)  # fmt: skip
# A network of minutes is less sure of its masks than one of SA-1B: so are the thresholds.
AUTOMATIC = dict(points_per_side=8, predicted_iou=0.8, stability=0.8)


def _tiny():
    net = dict(depth=1, width=16, heads=2, global_layers=(0,), patch=4, channels=16, mask_channels=8, decoder_depth=1,
               decoder_heads=2, decoder_mlp_dim=16, iou_dim=16)  # fmt: skip
    stage = _stage(size=16, world=recipes.WORLD, eval_count=32, net=net, task=dict(masks=2, points=1, refinements=0),
                   train=dict(steps=2, batch=8, lr=1e-3))  # fmt: skip
    automatic = dict(points_per_side=2, points_per_batch=4, predicted_iou=-10.0, stability=0.0)
    measure = _quality(recipes.WORLD, pictures=8, some=2, batch=8, automatic=automatic)
    return dict(stages=dict(sam=stage), order=("sam",), eval=measure)


def _mini():
    """Five rounds in the place of eleven: a point or a box, three clicks, and once more without a new one."""
    stage = _stage(
        size=32, world=WORLD, cached=20_000, eval_count=256, net=NET, task=dict(masks=3, points=3, refinements=1),
        train=dict(steps=1500, batch=16, lr=3e-3, optim=dict(name="muon")),
    )  # fmt: skip
    return dict(stages=dict(sam=stage), order=("sam",), eval=_quality(WORLD, automatic=AUTOMATIC))


def _text():
    """SAM that is told in words what to find: it learns from CLIP's vectors of pictures of objects (appendix D.5).

    CLIP has seen all pairs of colour and shape; a share of them is in no picture of SAM's, and in each that it is
    measured on.
    """
    one = recipes.FREE | dict(max_objects=1, sizes=("medium", "large"), heldout=())
    clip = recipes.contrastive(
        "clip", size=32, world=one, cached=40_000, eval_count=256, features=64, text=dict(length=20, vocab_size=512),
        image=dict(width=96, depth=3, heads=4, mlp_dim=384, patch_size=4, unroll=3),
        words=dict(width=96, depth=2, heads=4, mlp_dim=384, unroll=2),
        settings=dict(steps=1000, batch=64, lr=2e-3, optim=dict(name="muon")), pictures=256,
    )  # fmt: skip
    clip["stages"]["clip"]["data"]["options"] |= dict(closeup=0.8)  # as the crops of objects that it is to tell of
    told = dict(clip=clip["stages"]["clip"]["task"]["network"], clip_size=32)
    stage = _stage(
        size=32, world=WORLD, cached=20_000, eval_count=256, net=NET | dict(text_dim=64),
        task=dict(masks=3, points=1, refinements=0, told=0.75) | told,
        train=dict(steps=2500, batch=16, lr=3e-3, optim=dict(name="muon")),
    )  # fmt: skip
    stage["init"] = dict(clip=dict(stage="clip", part="network"))
    measure = _quality(WORLD, automatic=AUTOMATIC, texts=True, some=16)
    return dict(stages=clip["stages"] | dict(sam=stage), order=("clip", "sam"), text=clip["text"], eval=measure)


def _engine():
    """The data engine at the size of mini, on three or four objects a picture.

    start: 512 pictures, an object of each drawn by hand. assisted: the annotator clicks, and has time for one or two of
    a picture's objects. semi: masks that the network is very sure of are there, and there is time for one more.
    automatic: no annotator. Every stage begins with the network of the one before.
    """
    world = recipes.FREE | dict(min_objects=3, max_objects=4)
    steps = dict(start=400, assisted=400, semi=400, automatic=600)
    sure = AUTOMATIC | dict(predicted_iou=0.92, stability=0.92)
    makers = dict(
        start=dict(pictures=512, budget=6.0),
        assisted=dict(model="start", pictures=1024, budget=6.0),
        semi=dict(model="assisted", pictures=1024, budget=3.0, automatic=sure),
        automatic=dict(model="semi", pictures=2048, automatic=AUTOMATIC),
    )
    stages = {}
    for seed, (name, make) in enumerate(makers.items()):
        stage = _stage(
            size=32, world=world, eval_count=256, net=NET, task=dict(masks=3, points=3, refinements=1),
            train=dict(steps=steps[name], batch=16, lr=3e-3, optim=dict(name="muon")),
        )  # fmt: skip
        stage["make"] = dict(target="vgen.engine:Annotate", world=world, size=32, scene_seed=100 + seed, **make)
        if make.get("model"):
            stage["init"] = dict(network=dict(stage=make["model"], part="network"))
        stages[name] = stage
    quality = _quality(world, automatic=AUTOMATIC, stage="automatic")
    return dict(stages=stages, order=tuple(stages), eval=dict(target="vgen.engine:EngineReport", quality=quality))


def _small():
    """One accelerator: the whole world of scenes at 128 pixels, objects behind one another, all eleven rounds."""
    world = dict(occlusion=True)
    net = dict(depth=8, width=384, heads=6, global_layers=(1, 3, 5, 7), patch=8, window=8, channels=256,
               dtype="bfloat16")  # fmt: skip
    stage = _stage(
        size=128, world=world, cached=100_000, eval_count=1024, net=net, task=dict(masks=4, remat=True),
        train=dict(steps=30_000, batch=64, lr=4e-4),
    )  # fmt: skip
    automatic = AUTOMATIC | dict(points_per_side=16, predicted_iou=0.88, stability=0.9)
    return dict(stages=dict(sam=stage), order=("sam",), eval=_quality(world, pictures=512, automatic=automatic))


# -------------------------------------------------------------------------------------------------------- as published


def _paper():
    """ViT-H on SA-1B: 90,000 steps of 256 pictures of 1024 pixels, 64 masks a GPU of 256; not run here.

    L and B: the values of LARGE and BASE in models/sam.py for the network, 180,000 steps of 128 pictures, rates 4e-4
    and 8e-4. The image encoder starts from MAE's weights: name them as the stage's `init`. Other than in the paper: the
    rate falls with a cosine, not by tens at 60,000 and 86,666 steps, and neither stochastic depth (0.4), nor the
    decoder's dropout (0.1), nor a rate that falls from layer to layer (0.8) is used.
    """
    from vgen.models import sam

    adam = dict(lr=8e-4, b2=0.999, warmup=250, weight_decay=0.1)
    stage = dict(
        task=_task(1024, dict(sam.HUGE, remat="full", dtype="bfloat16"), masks=64, remat=True),
        data=dict(source="sa1b:sa-1b", size=1024, text=False, workers=16, options=dict(masks=64)),
        evaluate=dict(options=dict(masks=64, count=1024), batches=4),
        train=dict(steps=90_000, batch_size=256, optim=dict(main=adam), checkpoint_every=1000, keep_every=10_000,
                   log_every=100),
    )  # fmt: skip
    return dict(stages=dict(sam=stage), order=("sam",), mesh=dict(data=-1, fsdp=8), topology="v4:4x4x8")
