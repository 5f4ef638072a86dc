//! Forward and gradient of every operator, with criterion's statistics: `cargo bench -p hiper-benches`. Throughput is in
//! floating-point operations, or bytes where memory is the limit.

#![allow(missing_docs)]

use std::time::Duration;

use candle_core::Var;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hiper_benches::{Work, for_each_operator};
use hiper_kernels::AlignedAllocator;

#[global_allocator]
static ALLOCATOR: AlignedAllocator = AlignedAllocator;

fn throughput(work: Work) -> Throughput {
    match work {
        Work::Flops(count) => Throughput::Elements(count),
        Work::Bytes(count) => Throughput::Bytes(count),
    }
}

fn operators(c: &mut Criterion) {
    for_each_operator(|operator| {
        let mut group = c.benchmark_group(operator.name.as_str());
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3))
            .warm_up_time(Duration::from_millis(500));
        group.throughput(throughput(operator.forward_work));
        group.bench_function("forward", |b| b.iter(|| operator.apply(&operator.input)));
        let x = Var::from_tensor(&operator.input)?;
        let y = operator.apply(&x)?;
        group.throughput(throughput(operator.gradient_work));
        group.bench_function("gradient", |b| b.iter(|| y.backward()));
        group.finish();
        Ok::<_, candle_core::Error>(())
    })
    .expect("operators of fitting shapes");
}

criterion_group!(benches, operators);
criterion_main!(benches);
