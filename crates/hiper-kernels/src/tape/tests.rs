use candle_core::{DType, Device, Tensor, Var};

use super::{Tape, Value};
use crate::gpu::host::on_host;
use crate::testing::normals;
use crate::{Conv2d, Conv2dConfig, GroupNorm, Linear, Memory, Padding, ResnetBlock};

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_vec(normals(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
}

fn block(inputs: usize, outputs: usize) -> ResnetBlock {
    let norm =
        |channels| GroupNorm::new(&tensor(&[channels], 1), &tensor(&[channels], 2), 2, 1e-5, None).unwrap();
    let same = Conv2dConfig { stride: 1, padding: Padding::same(1) };
    let conv = |i, o, seed| Conv2d::new(tensor(&[o, i, 3, 3], seed), Some(&tensor(&[o], 3)), same).unwrap();
    ResnetBlock {
        norm1: norm(inputs),
        conv1: conv(inputs, outputs, 4),
        norm2: norm(outputs),
        conv2: conv(outputs, outputs, 5),
        conv_shortcut: (inputs != outputs)
            .then(|| Linear::new(tensor(&[outputs, inputs], 6), Some(&tensor(&[outputs], 7))).unwrap()),
        output_scale_factor: 2.0,
    }
}

/// A skip connection around a block, beside another input: a value that is used twice, concatenations, divisions.
fn compare() {
    let (down, up, last) = (block(4, 4), block(8, 4), block(6, 4));
    let [x, other] =
        [(tensor(&[1, 3, 2, 4], 8)), (tensor(&[1, 3, 2, 2], 9))].map(|t| Var::from_tensor(&t).unwrap());
    let weights = tensor(&[1, 3, 2, 4], 10);

    let expected = {
        let forward = |block: &ResnetBlock, parts: &[&Tensor], memory| {
            block.forward(&Tensor::cat(parts, 3).unwrap(), None, memory).unwrap()
        };
        let h = forward(&down, &[&x], Memory::Fast);
        let h = forward(&up, &[&h, &x], Memory::Lean);
        forward(&last, &[&h, &other], Memory::Fast)
    };
    let mut tape = Tape::default();
    let [first, second] = [&x, &other].map(|var| tape.input(var.as_tensor()));
    let h = down.on(&mut tape, (&first, None), None, Memory::Fast).unwrap();
    let h = up.on(&mut tape, (&h, Some(&first)), None, Memory::Lean).unwrap();
    let result = last.on(&mut tape, (&h, Some(&second)), None, Memory::Fast).unwrap();
    let got = tape.end(&result).unwrap();

    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&got), values(&expected));
    let gradients = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let (got, expected) = (gradients(&got), gradients(&expected));
    for var in [&x, &other] {
        let [got, expected] = [&got, &expected].map(|gradients| values(gradients.get(var).unwrap()));
        assert!(
            got.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)),
            "{got:?} {expected:?}"
        );
        assert!(got.iter().any(|g| *g != 0.0));
    }
}

#[test]
fn gradients_are_those_of_candles_graph() {
    compare();
    on_host(compare);
}

#[test]
fn a_value_may_be_both_parts_of_an_input() {
    let (down, up) = (block(4, 4), block(8, 4));
    let x = Var::from_tensor(&tensor(&[1, 3, 2, 4], 8)).unwrap();
    let gradient = |y: Tensor| {
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        gradients.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let h = down.forward(&x, None, Memory::Fast).unwrap();
    let expected = gradient(up.forward(&Tensor::cat(&[&h, &h], 3).unwrap(), None, Memory::Fast).unwrap());
    let mut tape = Tape::default();
    let first = tape.input(x.as_tensor());
    let h = down.on(&mut tape, (&first, None), None, Memory::Fast).unwrap();
    let y = up.on(&mut tape, (&h, Some(&h)), None, Memory::Fast).unwrap();
    let got = gradient(tape.end(&y).unwrap());
    assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)));
}

#[test]
fn a_network_without_gradients_is_not_recorded() {
    let x = tensor(&[1, 2, 2, 4], 1);
    let mut tape = Tape::default();
    let value = tape.input(&x);
    let y = block(4, 4).on(&mut tape, (&value, None), None, Memory::Fast).unwrap();
    assert!(tape.steps.is_empty() && tape.inputs.is_empty());
    assert!(!tape.end(&y).unwrap().track_op());
}

#[test]
fn a_result_that_no_input_reaches_has_no_gradient() {
    let x = Var::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
    let mut tape = Tape::default();
    tape.input(x.as_tensor());
    let y = tape.end(&Value::constant(&tensor(&[1, 2], 1))).unwrap();
    assert!(!y.track_op());
}

#[test]
fn more_inputs_than_candle_takes_are_an_error() {
    let vars = [1, 2, 3, 4].map(|seed| Var::from_tensor(&tensor(&[1, 1, 1, 2], seed)).unwrap());
    let (mut tape, both) = (Tape::default(), block(4, 2));
    let [a, b, c, d] = vars.each_ref().map(|var| tape.input(var.as_tensor()));
    let mut of = |a, b| both.on(&mut tape, (a, Some(b)), None, Memory::Fast).unwrap();
    let pairs = [of(&a, &b), of(&c, &d)];
    let all = of(&pairs[0], &pairs[1]);
    assert!(tape.end(&all).unwrap_err().to_string().contains("4 inputs"));
}
