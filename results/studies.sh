#!/bin/sh
# The studies that results/ has, whole or in part; what OUTPUTS has is not trained again. Made by
# collect_results.py. usage: sh results/studies.sh DATA [OUTPUTS]
# (DATA: folder with kmnist/ and cifar-10-batches-bin/)
# To train only what results/ lacks: cp -r results/add results/cifar results/kmnist OUTPUTS   first.
DATA=${1:?folder of the data}; OUTPUTS=${2:-outputs}
python3 train_kmnist.py 1 --rules backprop align_ada align_zero align_prop fa dfa last_layer --widths 8 16 32 --learning-rates 5 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada --widths 64 --learning-rates 5 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada align_zero --widths 8 16 32 64 --learning-rates 5 --epochs 20 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada align_zero align_prop fa dfa last_layer sign_symmetry kolen_pollack weight_mirror --widths 8 16 --learning-rates 5 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada kolen_pollack --widths 8 --learning-rates 5 --weight-decay 0.0001 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 2 --rules backprop align_ada align_zero fa dfa last_layer --widths 8 --learning-rates 1 2 5 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 2 --rules backprop align_ada --widths 8 --learning-rates 5 10 20 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 3 --widths 8 16 32 64 128 256 512 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 alignment_kmnist.py 2 --widths 8 16 32 64 --epochs 20 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada align_zero fa dfa last_layer --widths 8 32 --learning-rates 5 --seeds 99 100 101 102 103 --epochs 10 --log-alignment --precision fp32 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_kmnist.py 1 --rules backprop align_ada align_zero fa dfa last_layer --widths 8 32 --learning-rates 5 --seeds 99 100 101 102 103 --epochs 10 --log-alignment --precision bf16 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 alignment_kmnist.py 2 --widths 8 32 --epochs 10 --seeds 99 100 101 102 103 --precision fp32 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 alignment_kmnist.py 2 --widths 8 32 --epochs 10 --seeds 99 100 101 102 103 --precision bf16 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 1 --rules backprop align_ada align_zero align_prop fa dfa last_layer --widths 8 16 --learning-rates 5 --epochs 5 --evaluate-every 5 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 1 --rules backprop align_ada align_zero --widths 8 16 32 --learning-rates 5 --data-limits 3000 --batch-size 50 --epochs 10 --evaluate-every 10 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 6 --widths 8 --learning-rates 5 --epochs 5 --evaluate-every 5 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 4 --rules backprop align_ada align_zero fa dfa --widths 8 --learning-rates 5 --data-limits 45 150 450 1500 --evaluate-every 150 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 4 --rules backprop align_ada align_zero fa dfa --widths 16 --learning-rates 5 --data-limits 45 150 450 --evaluate-every 150 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 1 --rules backprop align_ada align_zero --widths 8 16 --data-limits 4500 --epochs 10 --evaluate-every 10 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 3 --widths 8 16 --learning-rates 0.0005 0.001 0.002 0.005 0.01 --data-limits 4500 --epochs 10 --evaluate-every 10 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_cifar.py 7 --widths 8 16 32 --learning-rates 5 --data-limits 1000 --seeds 100 101 102 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 alignment_cifar.py 2 --widths 8 16 --epochs 5 --seeds 99 100 101 --data-dir "$DATA" --outputs "$OUTPUTS"
python3 train_add.py 1 --variant published --rules backprop align_ada align_zero last_layer fa align_prop --widths 8 16 32 64 128 --seeds 99 100 101 102 103 --outputs "$OUTPUTS"
python3 train_add.py 1 --variant corrected --rules backprop align_ada align_zero last_layer fa align_prop --widths 8 16 32 64 128 --seeds 99 100 101 102 103 --outputs "$OUTPUTS"
python3 alignment_add.py 2 --widths 16 64 256 1024 --epochs 40 --seeds 99 100 101 --outputs "$OUTPUTS"
