"""Lines and tables of many tools, written by hand, with the numbers that a person reads from them."""

from collections.abc import Sequence

import pytest
from test_diagnosis_logs import points, read_bytes

Points = Sequence[tuple[float, float]]

# tool: the lines, the training losses and the evaluation losses as (place, value)
SHAPES: dict[str, tuple[str, Points, Points]] = {
    "words before a plain loss": (
        "Epoch 1 - loss=2.50 acc=0.40\nValidation - loss=2.01 acc=0.45\nEpoch 2 - loss=1.75 acc=0.50\n"
        "Validation - loss=1.90 acc=0.48\n",
        [(1, 2.5), (2, 1.75)], [(1, 2.01), (2, 1.9)],
    ),
    "fairseq": (
        "2023-01-01 10:00:00 | INFO | train_inner | epoch 001:    100 / 200 loss=9.8, nll_loss=9.1, ppl=550, "
        "num_updates=100, lr=1e-05, gnorm=2.1, loss_scale=128, train_wall=20\n"
        "2023-01-01 10:01:00 | INFO | train_inner | epoch 001:    200 / 200 loss=8.5, nll_loss=8.0, ppl=256, "
        "num_updates=200, lr=2e-05, gnorm=1.9, loss_scale=128, train_wall=20\n"
        "2023-01-01 10:01:10 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 8.25 | nll_loss 7.9 | "
        "num_updates 200\n"
        "2023-01-01 10:01:11 | INFO | train | epoch 001 | loss 9.15 | nll_loss 8.6 | num_updates 200 | lr 2e-05\n"
        "2023-01-01 10:03:10 | INFO | valid | epoch 002 | valid on 'valid' subset | loss 7.5 | nll_loss 7.1 | "
        "num_updates 400 | best_loss 7.5\n",
        [(100, 9.8), (200, 9.15)], [(200, 8.25), (400, 7.5)],
    ),
    "fairseq, old": (
        "| epoch 001 | loss 10.1 | ppl 1097 | num_updates 50 | lr 1e-05\n"
        "| epoch 001 | valid on 'dev' subset | loss 9.8 | ppl 891 | num_updates 50\n"
        "| epoch 002 | loss 9.2 | ppl 588 | num_updates 100 | lr 2e-05\n"
        "| epoch 002 | valid on 'dev' subset | loss 9.1 | ppl 548 | num_updates 100 | best_loss 9.1\n",
        [(50, 10.1), (100, 9.2)], [(50, 9.8), (100, 9.1)],
    ),
    "flair": (
        "2021-01-01 10:00:00,000 epoch 1 - iter 2/4 - loss 0.92 - samples/sec: 30.1 - lr: 0.1\n"
        "2021-01-01 10:00:10,000 epoch 1 - iter 4/4 - loss 0.75 - samples/sec: 30.1 - lr: 0.1\n"
        "2021-01-01 10:00:11,000 EPOCH 1 done: loss 0.75 - lr 0.1\n"
        "2021-01-01 10:00:15,000 DEV : loss 0.31 - f1-score (micro avg) 0.81\n"
        "2021-01-01 10:01:00,000 epoch 2 - iter 2/4 - loss 0.41 - samples/sec: 30.1 - lr: 0.1\n"
        "2021-01-01 10:01:10,000 epoch 2 - iter 4/4 - loss 0.38 - samples/sec: 30.1 - lr: 0.1\n"
        "2021-01-01 10:01:15,000 DEV : loss 0.27 - f1-score (micro avg) 0.85\n",
        [(2, 0.92), (4, 0.75), (6, 0.41), (8, 0.38)], [(4, 0.31), (8, 0.27)],
    ),
    "NeMo": (  # whose every line carries the last evaluation on
        "0: Training epoch 0, iteration 9/99 | lr: 5.6e-06 | global_batch_size: 32 | global_step: 9 | "
        "reduced_train_loss: 2.91 | train_step_timing in s: 0.189 | consumed_samples: 320\n"
        "0: Training epoch 0, iteration 10/99 | lr: 5.8e-06 | global_batch_size: 32 | global_step: 10 | "
        "reduced_train_loss: 2.778 | train_step_timing in s: 0.1903 | consumed_samples: 352 | val_loss: 2.861 | "
        "val_ppl: 17.57\n"
        "0: Training epoch 0, iteration 11/99 | lr: 6e-06 | global_batch_size: 32 | global_step: 11 | "
        "reduced_train_loss: 2.782 | train_step_timing in s: 0.1903 | consumed_samples: 384 | val_loss: 2.861 | "
        "val_ppl: 17.57\n"
        "0: Training epoch 0, iteration 20/99 | lr: 6e-06 | global_batch_size: 32 | global_step: 20 | "
        "reduced_train_loss: 2.5 | train_step_timing in s: 0.1903 | consumed_samples: 672 | val_loss: 2.7 | "
        "val_ppl: 14.9\n"
        "0: Training epoch 0, iteration 21/99 | lr: 0 | global_batch_size: 32 | reduced_train_loss: 2.4 | "
        "consumed_samples: 704 | val_loss: 2.7\n",
        [(9, 2.91), (10, 2.778), (11, 2.782), (20, 2.5), (21, 2.4)], [(10, 2.861), (20, 2.7)],
    ),
    "Caffe": (
        "I0101 10:00:00.000000  1234 solver.cpp:218] Iteration 100 (5.1 iter/s, 19.6s/100 iters), loss = 2.3\n"
        "I0101 10:00:09.000000  1234 solver.cpp:330] Iteration 200, Testing net (#0)\n"
        "I0101 10:00:10.000000  1234 solver.cpp:397]     Test net output #0: loss = 1.2 (* 1 = 1.2 loss)\n"
        "I0101 10:00:20.000000  1234 solver.cpp:218] Iteration 200 (5.1 iter/s, 19.6s/100 iters), loss = 1.1\n",
        [(100, 2.3), (200, 1.1)], [(200, 1.2)],
    ),
    "timm and DeiT": (
        "Epoch: [0]  [ 10/100]  eta: 0:01:00  lr: 0.000100  loss: 6.9078 (6.9100)  time: 0.5  data: 0.1\n"
        "Test:  [ 0/10]  eta: 0:00:10  loss: 6.5 (6.5)  acc1: 1.0 (1.0)  time: 0.3\n"
        "* Acc@1 61.2 Acc@5 84 loss 11.5\n",
        [(0, 6.9078)], [(0, 11.5)],
    ),
    "TensorFlow estimator": (
        "INFO:tensorflow:loss = 2.25, step = 100 (12.1 sec)\nINFO:tensorflow:loss = 1.5, step = 200 (12.0 sec)\n"
        "INFO:tensorflow:Saving dict for global step 200: eval_accuracy = 0.81, eval_loss = 1.23, global_step = 200, "
        "loss = 1.23\n***** Eval results *****\n  loss = 1.23\n",
        [(100, 2.25), (200, 1.5)], [(200, 1.23)],
    ),
    "Megatron": (
        " iteration      500/    2000 | consumed samples:  4000 | elapsed time (ms): 150.5 | learning rate: "
        "1.500E-05 | global batch size:     8 | lm loss: 3.125000E+00 | loss scale: 1.0 | grad norm: 1.2 |\n"
        " iteration     1000/    2000 | consumed samples:  8000 | elapsed time (ms): 150.5 | learning rate: "
        "1.000E-05 | global batch size:     8 | lm loss: 2.500000E+00 | loss scale: 1.0 | grad norm: 1.1 |\n"
        "-----------------------------------------------------------------------------------------------\n"
        " validation loss at iteration 1000 | lm loss value: 2.31E+00 | lm loss PPL: 1.007E+01 |\n"
        "-----------------------------------------------------------------------------------------------\n",
        [(500, 3.125), (1000, 2.5)], [(1000, 2.31)],
    ),
    "records are passed over": (
        "Epoch 1: train_loss: 0.9, val_loss: 0.40\n保存最佳模型 (val_loss=0.31)\nbest val_loss: 0.31\n"
        "New best val_loss 0.31\n"
        "Epoch 2: train_loss: 0.7, val_loss: 0.35, best_val_loss: 0.31\n"
        "Epoch 3: train_loss: 0.6, val_loss: 0.36 *best*\n",
        [(1, 0.9), (2, 0.7), (3, 0.6)], [(1, 0.4), (2, 0.35), (3, 0.36)],
    ),
    "llm.c": (
        "s:0 tel:10.9\ns:1 trl:10.95 lr:0.000001 norm:15.3\ns:100 trl:4.2 lr:0.00006 norm:1.2\ns:100 tel:4.1\n"
        "s:100 eval:0.26\n",
        [(1, 10.95), (100, 4.2)], [(0, 10.9), (100, 4.1)],
    ),
    "llm.c, old": ("step:100 tel:3.28\nstep:200 tel:3.11\n", [], [(100, 3.28), (200, 3.11)]),
    "build-nanogpt": ("0 val 10.95\n0 hella 0.2463\n1 train 10.5\n2 train 9.5\n250 val 5.9\n", [(1, 10.5), (2, 9.5)],
                      [(0, 10.95), (250, 5.9)]),
    "nanoGPT": (
        "step 0: train loss 4.2874, val loss 4.2823\niter 0: loss 4.2649, time 2311.1ms, mfu -100.00%\n"
        "iter 10: loss 3.1, time 20.1ms, mfu 12.5%\nstep 20: train loss 2.5, val loss 2.6\n",
        [(0, 4.2649), (10, 3.1), (20, 2.5)], [(0, 4.2823), (20, 2.6)],
    ),
    "OpenNMT": (
        "[2023-01-01 10:00:00,000 INFO] Step 50/1000; acc: 9.1; ppl: 66.7; xent: 4.2; lr: 0.001; bsz: 20/21\n"
        "[2023-01-01 10:01:00,000 INFO] Step 100/1000; acc: 19.1; ppl: 33.1; xent: 3.5; lr: 0.001; sents: 512\n"
        "[2023-01-01 10:01:05,000 INFO] Validation perplexity: 20.085537\n"
        "[2023-01-01 10:01:05,000 INFO] Validation accuracy: 25.1\n",
        [(50, 4.2), (100, 3.5)], [(100, 3.0)],
    ),
    "XGBoost": (
        "[0]\ttrain-logloss:0.6\teval-logloss:0.7\n[1]\ttrain-logloss:0.5\teval-logloss:0.65\n",
        [(0, 0.6), (1, 0.5)], [(0, 0.7), (1, 0.65)],
    ),
    "LightGBM": (
        "[LightGBM] [Info] Total Bins 1234\n[10]\ttraining's binary_logloss: 0.4\tvalid_1's binary_logloss: 0.55\n"
        "[20]\ttraining's binary_logloss: 0.3\tvalid_1's binary_logloss: 0.5\n",
        [(10, 0.4), (20, 0.3)], [(10, 0.55), (20, 0.5)],
    ),
    "LightGBM, one set": ("[1]\tvalid_0's binary_logloss: 0.6\n[2]\tvalid_0's binary_logloss: 0.5\n", [],
                          [(1, 0.6), (2, 0.5)]),
    "CatBoost": (
        "0:\tlearn: 0.69\ttest: 0.68\tbest: 0.68 (0)\ttotal: 5ms\tremaining: 4s\n"
        "1:\tlearn: 0.61\ttest: 0.64\tbest: 0.64 (1)\ttotal: 9ms\tremaining: 4s\n",
        [(0, 0.69), (1, 0.61)], [(0, 0.68), (1, 0.64)],
    ),
    # the first row of spaCy is of one batch, all others of eval_frequency batches; the parts are added
    "spaCy": (
        "============================= Training pipeline =============================\n"
        "E    #       LOSS TOK2VEC  LOSS NER  ENTS_F  ENTS_P  ENTS_R  SCORE \n"
        "---  ------  ------------  --------  ------  ------  ------  ------\n"
        "  0       0          0.00     45.67    0.12    0.09    0.20    0.00\n"
        "  0     200        121.25   2314.50   70.11   72.05   68.27    0.70\n"
        "  1     400         80.00    900.00   75.00   76.00   74.00    0.75\n",
        [(200, 2435.75), (400, 980.0)], [],
    ),
    "fastai": (
        "epoch     train_loss  valid_loss  accuracy  time    \n0         2.500000    2.250000    0.300000  00:10    \n"
        "1         2.000000    2.125000    0.350000  00:10    \n",
        [(0, 2.5), (1, 2.0)], [(0, 2.25), (1, 2.125)],
    ),
    "a notebook's table": (
        "Step\tTraining Loss\tValidation Loss\n500\tNo log\t2.75\n1000\t2.5\t2.5\n1500\t1.75\t2.25\n",
        [(1000, 2.5), (1500, 1.75)], [(500, 2.75), (1000, 2.5), (1500, 2.25)],
    ),
    "a model card's table": (
        "| Training Loss | Epoch | Step | Validation Loss |\n|:-------------:|:-----:|:----:|:---------------:|\n"
        "| No log        | 1.0   | 100  | 0.75            |\n| 0.5           | 2.0   | 200  | 0.625           |\n",
        [(200, 0.5)], [(100, 0.75), (200, 0.625)],
    ),
    "Marian": (
        "[2023-05-01 10:00:00] Ep. 1 : Up. 1000 : Sen. 100,000 : Cost 5.1 * 1,234,567 : Time 12.3s : 45678.90 words/s\n"
        "[2023-05-01 10:01:00] Ep. 1 : Up. 2000 : Sen. 200,000 : Cost 4.25 : Time 12.3s : L.r. 3e-05\n"
        "[2023-05-01 10:01:10] [valid] Ep. 1 : Up. 2000 : ce-mean-words : 4.0 : new best\n"
        "[2023-05-01 10:01:10] [valid] Ep. 1 : Up. 2000 : perplexity : 54.6 : new best\n"
        "[2023-05-01 10:01:10] [valid] Ep. 1 : Up. 2000 : bleu : 3.2 : new best\n"
        "[2023-05-01 10:09:10] [valid] Ep. 2 : Up. 4000 : ce-mean-words : 4.05 : stalled 1 times (last best: 4.0)\n",
        [(1000, 5.1), (2000, 4.25)], [(2000, 4.0), (4000, 4.05)],
    ),
    "detectron2": (
        "[01/01 10:00:00 d2.utils.events]:  eta: 0:10:00  iter: 19  total_loss: 1.2  loss_cls: 0.7  loss_box_reg: 0.5  "
        "time: 0.5  data_time: 0.01  lr: 0.0002  max_mem: 3000M\n"
        "[01/01 10:00:10 d2.utils.events]:  eta: 0:09:50  iter: 39  total_loss: 1.0  loss_cls: 0.6  loss_box_reg: 0.4  "
        "time: 0.5  data_time: 0.01  lr: 0.0004  max_mem: 3000M\n",
        [(19, 1.2), (39, 1.0)], [],
    ),
    "OLMo": (
        "2024-01-01 10:00:00.000\thost:0\tolmo.train:900\tINFO\t[step=10/1000,epoch=0]\n"
        "    optim/total_grad_norm=1.2\n    train/CrossEntropyLoss=2.5\n    train/Perplexity=12.18\n"
        "    throughput/total_tokens=41,943,040\n"
        "2024-01-01 10:00:10.000\thost:0\tolmo.train:900\tINFO\t[step=20/1000,epoch=0]\n"
        "    optim/total_grad_norm=1.1\n    train/CrossEntropyLoss=2.25\n    train/Perplexity=9.49\n"
        "    eval/c4_en-validation/CrossEntropyLoss=2.75\n    eval/pile-validation/CrossEntropyLoss=3.5\n",
        [(10, 2.5), (20, 2.25)], [(20, 2.75)],
    ),
    "mmengine": (
        "2023/06/01 10:00:00 - mmengine - INFO - Epoch(train)  [1][ 50/100]  lr: 4.0e-03  eta: 0:01:00  time: 0.5  "
        "data_time: 0.1  memory: 300  loss: 0.42  decode.loss_ce: 0.3  aux.loss_ce: 0.12\n"
        "2023/06/01 10:00:30 - mmengine - INFO - Epoch(train)  [1][100/100]  lr: 4.0e-03  eta: 0:00:30  time: 0.5  "
        "data_time: 0.1  memory: 300  loss: 0.31  decode.loss_ce: 0.2  aux.loss_ce: 0.11\n"
        "2023/06/01 10:00:40 - mmengine - INFO - Epoch(val) [1][30/30]    aAcc: 90.1  mIoU: 71.2  data_time: 0.1\n"
        "2023/06/01 10:01:00 - mmengine - INFO - Epoch(train)  [2][ 50/100]  lr: 4.0e-03  eta: 0:00:10  time: 0.5  "
        "data_time: 0.1  memory: 300  loss: 0.25  decode.loss_ce: 0.15  aux.loss_ce: 0.1\n",
        [(50, 0.42), (100, 0.31), (150, 0.25)], [],
    ),
    "mmengine by iterations": (
        "2023/06/01 10:00:00 - mmengine - INFO - Iter(train) [   50/40000]  lr: 4.0e-03  loss: 2.5  time: 0.5\n"
        "2023/06/01 10:00:30 - mmengine - INFO - Iter(train) [  100/40000]  lr: 4.0e-03  loss: 2.0  time: 0.5\n",
        [(50, 2.5), (100, 2.0)], [],
    ),
    "Lightning's metrics.csv": (
        "epoch,lr-AdamW,step,train_loss,val_loss\n0,0.001,9,2.5,\n0,0.001,19,2.25,\n0,,19,,2.375\n1,0.001,29,2.0,\n"
        "1,,39,,2.125\n",
        [(9, 2.5), (19, 2.25), (29, 2.0)], [(19, 2.375), (39, 2.125)],
    ),
    "Keras' CSVLogger": (
        "epoch,accuracy,loss,val_accuracy,val_loss\n0,0.5,1.5,0.45,1.625\n1,0.6,1.25,0.5,1.5\n",
        [(0, 1.5), (1, 1.25)], [(0, 1.625), (1, 1.5)],
    ),
    "Ultralytics' results.csv": (
        "                  epoch,         train/box_loss,         train/cls_loss,         train/dfl_loss,   "
        "metrics/precision(B),           val/box_loss,           val/cls_loss,           val/dfl_loss,   lr/pg0\n"
        "                      1,                    1.5,                    2.5,                   1.25,   "
        "                 0.5,                    1.0,                    2.0,                    1.5,    0.01\n"
        "                      2,                   1.25,                    2.0,                    1.0,   "
        "                 0.6,                    1.0,                    1.5,                    1.5,    0.01\n",
        [(1, 5.25), (2, 4.25)], [(1, 4.5), (2, 4.0)],
    ),
    "timm's summary.csv": (
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,6.9,6.5,1.2,5.1,1e-05\n1,6.25,5.75,4.5,9.0,2e-05\n",
        [(0, 6.9), (1, 6.25)], [(0, 6.5), (1, 5.75)],
    ),
    "flair's loss.tsv": (
        "EPOCH\tTIMESTAMP\tLEARNING_RATE\tTRAIN_LOSS\tDEV_LOSS\tDEV_F1\n1\t10:00:00\t0.1000\t0.75\t0.5\t0.8\n"
        "2\t10:01:00\t0.1000\t0.5\t0.25\t0.9\n",
        [(1, 0.75), (2, 0.5)], [(1, 0.5), (2, 0.25)],
    ),
    "a csv with quotes and a total beside its parts": (
        '"step","total_loss","box_loss","note"\n10,2.5,1.0,"a, b"\n20,2.0,0.5,"c"\n', [(10, 2.5), (20, 2.0)], [],
    ),
    "LLaMA-Factory, two ranks interleaved": (
        "".join(
            f'{{"current_steps": {step}, "total_steps": 60, "{name}": {value}, "lr": 1e-05, "epoch": {step / 20}}}\n'
            for step, name, value in [
                (10, "loss", 2.5), (20, "loss", 2.25), (10, "loss", 2.51), (20, "eval_loss", 2.3), (30, "loss", 2.0),
                (20, "loss", 2.26), (40, "loss", 1.75), (30, "loss", 2.01), (50, "loss", 1.5), (40, "loss", 1.76),
                (60, "loss", 1.25), (50, "loss", 1.51),
            ]
        ),
        [(10, 2.5), (20, 2.25), (30, 2.0), (40, 1.75), (50, 1.5), (60, 1.25)], [(20, 2.3)],
    ),
    "PyTorch tutorials": (
        "Epoch [1/2], Step [100/200], Loss: 2.50\nEpoch [1/2], Step [200/200], Loss: 2.00\n"
        "Epoch [2/2], Step [100/200], Loss: 1.75\nEpoch [2/2], Step [200/200], Loss: 1.50\n",
        [(100, 2.5), (200, 2.0), (300, 1.75), (400, 1.5)], [],
    ),
    "epochs as headings, steps within them": (
        "Epoch 1/2\nstep 10/20 loss 2.5\nstep 20/20 loss 2.25\nEpoch 2/2\nstep 10/20 loss 2.0\nstep 20/20 loss 1.5\n",
        [(10, 2.5), (20, 2.25), (30, 2.0), (40, 1.5)], [],
    ),
    "records within records": (
        '{"epoch": 1, "train": {"loss": 2.5, "acc": 0.4}, "valid": {"loss": 2.25, "acc": 0.41}}\n'
        '{"epoch": 2, "train": {"loss": 2.0, "acc": 0.5}, "valid": {"loss": 2.125, "acc": 0.45}}\n',
        [(1, 2.5), (2, 2.0)], [(1, 2.25), (2, 2.125)],
    ),
    "AllenNLP and others with words in their keys": (
        '{"best_epoch": 0, "epoch": 0, "training_loss": 0.75, "validation_loss": 0.5, "best_validation_loss": 0.5}\n'
        '{"best_epoch": 1, "epoch": 1, "train loss": 0.5, "val loss": 0.25, "best_validation_loss": 0.25}\n',
        [(0, 0.75), (1, 0.5)], [(0, 0.5), (1, 0.25)],
    ),
    "Chinese words": (
        "epoch: 1 训练损失: 2.5 验证损失: 2.25\nepoch: 2 训练损失：2.0 验证损失：2.125 最佳验证损失：2.1\n"
        "验证集 loss=2.0\n",
        [(1, 2.5), (2, 2.0)], [(1, 2.25), (2, 2.125), (2, 2.0)],
    ),
    "Lightning's bar carries the last evaluation on": (
        "Epoch 0:  50%|#####     | 5/10 [00:01<00:01, 5.0it/s, loss=2.5]\n"
        "Epoch 1:  50%|#####     | 5/10 [00:01<00:01, 5.0it/s, loss=2.25, val_loss=2.4]\n"
        "Epoch 1:  60%|######    | 6/10 [00:01<00:01, 5.0it/s, loss=2.125, val_loss=2.4]\n"
        "Epoch 2:  50%|#####     | 5/10 [00:01<00:01, 5.0it/s, loss=2.0, val_loss=2.2]\n",
        [(0, 2.5), (1, 2.25), (1, 2.125), (2, 2.0)], [(1, 2.4), (2, 2.2)],
    ),
    "epochs in lines of their own": (
        "Epoch: 01 | Epoch Time: 0m 30s\n\tTrain Loss: 5.5 | Train PPL: 244.692\n\t Val. Loss: 5.0 |  PPL: 148.413\n"
        "Epoch: 02 | Epoch Time: 0m 30s\n\tTrain Loss: 4.5 | Train PPL:  90.017\n\t Val. Loss: 4.75 |  PPL: 115.58\n",
        [(1, 5.5), (2, 4.5)], [(1, 5.0), (2, 4.75)],
    ),
    "the Trainer's last words are of the whole run": (
        "{'loss': 2.5, 'epoch': 1.0}\n{'eval_loss': 2.25, 'epoch': 1.0}\n{'loss': 2.0, 'epoch': 2.0}\n"
        "***** train metrics *****\n  epoch                    =        2.0\n  train_loss               =       2.25\n"
        "  train_runtime            = 0:00:45.67\n***** eval metrics *****\n  epoch                   =        2.0\n"
        "  eval_loss               =       2.25\n",
        [(1, 2.5), (2, 2.0)], [(1, 2.25)],
    ),
    # a plain loss after the heading of an evaluation may be either, so it counts for nothing
    "DeepSpeed-Chat": (
        "***** Evaluating perplexity, Epoch 0/2 *****\nppl: 12.18, loss: 2.5\n"
        "Epoch: 0, Step: 10, Rank: 0, loss = 2.25\nEpoch: 0, Step: 20, Rank: 0, loss = 2.0\n"
        "***** Evaluating perplexity, Epoch 1/2 *****\nppl: 7.39, loss: 1.9\n"
        "Epoch: 1, Step: 10, Rank: 0, loss = 1.75\n",
        [(10, 2.25), (20, 2.0), (30, 1.75)], [],
    ),
    "tokens that are valid": (
        "step 10 valid tokens: 4096 loss: 2.5\nstep 20 valid tokens: 4096 loss: 2.25\n", [(10, 2.5), (20, 2.25)], [],
    ),
    "a word after the loss leaves it open": (
        '{"split": "valid", "epoch": 1, "loss": 2.5}\n{"split": "train", "epoch": 1, "loss": 2.25}\n'
        '{"loss": 2.1, "epoch": 2, "split": "valid"}\nepoch 2 loss: 2.0 (test)\n{"loss": 1.9, "epoch": 3}\n',
        [(1, 2.25), (3, 1.9)], [(1, 2.5)],
    ),
    "batches of an evaluation": (
        "Epoch 1\nTraining...\nbatch 1 loss 2.5\nbatch 2 loss 2.25\nValidating...\nbatch 1 loss 2.6\nbatch 2 loss 2.7\n"
        "Validation loss: 2.65\nEpoch 2\nTraining...\nbatch 1 loss 2.0\n"
        "Test: [10/20] Loss 1.2 (1.3)\nTest: [20/20] Loss 2.5\n",
        [(1, 2.5), (1, 2.25), (2, 2.0)], [(1, 2.65)],
    ),
    "steps of an evaluation": (
        "Training\nstep 1 loss 5.0\nstep 50 loss 2.0\nstep 100 loss 1.0\nValidating...\nstep 1 loss 1.2\n"
        "step 2 loss 1.4\nval loss: 1.3\nstep 101 loss 0.9\nValidating...\nstep 1 loss 1.0\nstep 2 loss 1.1\n"
        "val loss: 1.05\n",
        [(1, 5.0), (50, 2.0), (100, 1.0), (101, 0.9)], [(100, 1.3), (101, 1.05)],
    ),
    "W&B's csv": (
        '"Step","run-1 - train/loss","run-1 - train/loss__MIN","run-1 - train/loss__MAX"\n"1","2.5","2.4","2.6"\n'
        '"2","2.0","1.9","2.1"\n',
        [(1, 2.5), (2, 2.0)], [],
    ),
    "two evaluation sets: the first that spoke": (
        "{'loss': 2.5, 'epoch': 0.5}\n{'eval_en_loss': 2.25, 'epoch': 1.0}\n{'eval_zh_loss': 3.25, 'epoch': 1.0}\n"
        "{'loss': 2.0, 'epoch': 1.5}\n{'eval_en_loss': 2.0, 'epoch': 2.0}\n{'eval_zh_loss': 3.0, 'epoch': 2.0}\n",
        [(0.5, 2.5), (1.5, 2.0)], [(1.0, 2.25), (2.0, 2.0)],
    ),
}  # fmt: skip


def rounded(values: Points) -> Points:
    """Values to six places: a perplexity's logarithm, a sum of parts."""
    return [(place, round(value, 6)) for place, value in values]


@pytest.mark.parametrize("tool", SHAPES)
@pytest.mark.parametrize("piece", [1 << 20, 11])
def test_shapes(tool: str, piece: int) -> None:
    text, train, evaluation = SHAPES[tool]
    run = read_bytes(text.encode(), piece)
    assert rounded(points(run)) == list(train)
    assert rounded(points(run, "eval_loss")) == list(evaluation)
    assert run.restarts == 0
