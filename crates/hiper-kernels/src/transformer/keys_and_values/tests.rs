use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::super::tests::{Head, Sizes, WIDE};
use super::super::{Context, Transformer, TransformerBlock};
use crate::gpu::host::on_host;
use crate::tape::Tape;
use crate::testing::{check_on_card, normals};
use crate::{Linear, Memory};

/// Two transformers, one after the other, whose text layers all lie side by side; and their blocks.
fn two_of(sizes: Sizes) -> ([Transformer; 2], Vec<Arc<TransformerBlock>>) {
    let weights = |i: u64, of: u64| {
        let [weight, bias] = sizes.tensors(1000 * (i + 1) + of, sizes.context, sizes.channels);
        (weight.into(), Some(bias))
    };
    let of_one = || (0..sizes.blocks).flat_map(|i| [weights(i, 32), weights(i, 34)]);
    let mut layers = Linear::all_side_by_side(of_one().chain(of_one()).collect()).unwrap().into_iter();
    let mut transformer = || {
        let mut transformer = sizes.transformer();
        for block in &mut transformer.blocks {
            let block = Arc::get_mut(block).unwrap();
            (block.attn2.to_k, block.attn2.to_v) = (layers.next().unwrap(), layers.next().unwrap());
        }
        transformer
    };
    let both = [transformer(), transformer()];
    let blocks = both.iter().flat_map(|transformer| transformer.blocks.clone()).collect();
    (both, blocks)
}

/// `x` through some transformers, on a tape.
fn through(transformers: &[Transformer], context: &Context, x: &Tensor, memory: Memory) -> Result<Tensor> {
    let mut tape = Tape::default();
    let (mut h, text) = (tape.input(x), context.on(&mut tape)?);
    for transformer in transformers {
        h = transformer.on(&mut tape, &h, (context, &text), memory)?;
    }
    tape.end(&h)
}

#[test]
fn keys_and_values_of_all_blocks_are_computed_together_on_a_card() {
    for (dtype, memory, blocks, [batch, tokens, tail]) in [
        (DType::F16, Memory::Fast, 1, [2, 15, 5]),
        (DType::F16, Memory::Lean, 2, [1, 72, 5]),
        (DType::BF16, Memory::Fast, 2, [1, 2, 17]),
    ] {
        let sizes = Sizes { blocks, dtype, ..WIDE };
        let (transformers, blocks) = on_host(|| two_of(sizes));
        let head = Head::new(sizes, batch, tokens);
        check_on_card(
            dtype,
            &[&[batch, 1, 2, sizes.channels], &[batch, tail, sizes.context]],
            |x| {
                let context = head.before(&x[1])?.project(&blocks)?;
                assert!(context.keys_and_values.is_some());
                through(&transformers, &context.project(&blocks)?, &x[0], memory)
            },
            |x| head.definition(&head.definition(&x[0], &x[1]), &x[1]),
        );
    }
}

#[test]
fn what_no_kernel_takes_is_not_computed_together() {
    let sizes = WIDE;
    let projected = |sizes: Sizes, dtype: DType| {
        on_host(|| {
            let tokens = Tensor::zeros((1, 3, sizes.context), dtype, &Device::Cpu).unwrap();
            Context::whole(&tokens).project(&two_of(sizes).1).unwrap().keys_and_values.is_some()
        })
    };
    assert!(projected(sizes, DType::F16));
    assert!(!projected(Sizes { channels: 48, ..sizes }, DType::F16));
    assert!(!projected(Sizes { dtype: DType::F32, ..sizes }, DType::F32));
    let tokens = Tensor::zeros((1, 3, sizes.context), DType::F32, &Device::Cpu).unwrap();
    let on_cpu = Context::whole(&tokens).project(&two_of(Sizes { dtype: DType::F32, ..sizes }).1).unwrap();
    assert!(on_cpu.keys_and_values.is_none());
    let apart = on_host(|| {
        let transformers = [sizes.transformer(), sizes.transformer()];
        let blocks: Vec<_> = transformers.iter().flat_map(|transformer| transformer.blocks.clone()).collect();
        Context::whole(&tokens.to_dtype(DType::F16).unwrap()).project(&blocks).unwrap()
    });
    assert!(apart.keys_and_values.is_none());
}

#[test]
fn blocks_that_have_no_part_in_a_result_are_an_error() {
    let sizes = WIDE;
    on_host(|| {
        let (transformers, blocks) = two_of(sizes);
        let tensor = |shape: [usize; 3]| {
            let values = Tensor::from_vec(normals(shape.iter().product(), 5), &shape, &Device::Cpu).unwrap();
            Var::from_tensor(&values.to_dtype(DType::F16).unwrap()).unwrap()
        };
        let (x, text) = (tensor([1, 2, 64]).unsqueeze(0).unwrap(), tensor([1, 3, 40]));
        let context = Context::whole(text.as_tensor()).project(&blocks).unwrap();
        let y = |count: usize| through(&transformers[..count], &context, &x, Memory::Fast).unwrap();
        assert!(y(2).sum_all().unwrap().backward().is_ok());
        let error = y(1).sum_all().unwrap().backward().unwrap_err().to_string();
        assert!(error.contains("went past some of the blocks"), "{error}");
        assert!(y(2).sum_all().unwrap().backward().is_ok());
        let others = Context::whole(text.as_tensor()).project(&blocks[..1]).unwrap();
        let error = through(&transformers, &others, &x, Memory::Fast).unwrap_err().to_string();
        assert!(error.contains("projected for other blocks"), "{error}");
    });
}
