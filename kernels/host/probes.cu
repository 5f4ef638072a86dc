// Kernels that show what the shim does, and errors that it must find. tests/shim.rs runs them; nothing else does.

#include "cluster.cuh"
#include "warpgroup.cuh"

KERNEL(scale_f32, (256), float* values, float factor, int count) {
    take_turn();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] *= factor;
}

// sums[block] = the sum of a block's values.
KERNEL(probe_block_sum, (256), float* sums, const float* values) {
    take_turn();
    float sum = block_sum(values[blockIdx.x * blockDim.x + threadIdx.x], reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// d[16 × 8] = a[16 × depth] · b[depth × 8], by way of shared memory; a and b are row by row.
template <typename T> DEVICE void product(float* d, const T* a, const T* b, int depth) {
    T* tile_a = reinterpret_cast<T*>(shared_memory());
    T* tile_b = tile_a + 16 * depth;
    int lane = threadIdx.x;
    for (int i = lane * 8; i < 16 * depth; i += 32 * 8) cp_async_16(tile_a + i, a + i);
    for (int i = lane * 8; i < depth * 8; i += 32 * 8) cp_async_16(tile_b + i, b + i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float sums[4] = {};
    int k = 0;
    for (; k + 16 <= depth; k += 16) {
        uint32_t left[4], right[2];
        ldmatrix_x4(left, tile_a + (lane % 16) * depth + k + lane / 16 * 8);
        ldmatrix_x2_transposed(right, tile_b + (k + lane % 16) * 8);
        mma_m16n8k16<T>(sums, left, right);
    }
    if (k < depth) {
        uint32_t left[2], right[4];
        ldmatrix_x2(left, tile_a + (lane % 16) * depth + k);
        ldmatrix_x4_transposed(right, tile_b + (k + lane % 8) * 8);
        mma_m16n8k8<T>(sums, left[0], left[1], right[0]);
    }
    float* row = d + lane / 4 * 8 + lane % 4 * 2;
    store_vector(row, float2{sums[0], sums[1]});
    store_vector(row + 64, float2{sums[2], sums[3]});
}
KERNEL(probe_product_f16, (32), float* d, const f16* a, const f16* b, int depth) { take_turn(); product(d, a, b, depth); }
KERNEL(probe_product_bf16, (32), float* d, const bf16* a, const bf16* b, int depth) { take_turn(); product(d, a, b, depth); }

KERNEL(probe_round, (32), f16* half, bf16* brain, const float* values, int count) {
    take_turn();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        half[i] = from_f32<f16>(values[i]);
        brain[i] = from_f32<bf16>(values[i]);
    }
}

// Reads what the next thread writes, without a barrier between unless `barrier`.
KERNEL(probe_race, (64), float* values, int barrier) {
    take_turn();
    float* cells = reinterpret_cast<float*>(shared_memory());
    cells[threadIdx.x] = threadIdx.x;
    if (barrier) __syncthreads();
    values[threadIdx.x] = cells[(threadIdx.x + 1) % blockDim.x];
}

// Every block writes the same.
KERNEL(probe_blocks_race, (64), float* values) { take_turn(); values[threadIdx.x] = blockIdx.x; }

// What goes wrong: 0 nothing, 1 a thread ends before a barrier, 2 a lane skips a shuffle, 3 an address is not aligned, 4 a write
// behind shared memory, 5 a copy is read before it has been waited for, 6 a read behind shared memory, 7 a read behind the
// values, 8 a read of what another lane wrote before a shuffle, which is no barrier, 9 a thread that does not take its turn, 10
// a copy before it.
KERNEL(probe_error, (64), float* values, int error) {
    if (error == 10) cp_async_16(shared_memory(), values);
    if (error != 9 || threadIdx.x != 40) take_turn();
    float* cells = reinterpret_cast<float*>(shared_memory());
    int i = threadIdx.x;
    __syncthreads();
    float next = values[i];
    if (error != 2 || i != 40) next = __shfl_xor_sync(ALL_LANES, next, 1);
    if (error == 3) next = load_vector<float4>(values + i % 2).x;
    cells[error == 4 ? i + 1 : i] = next;
    if (error == 5 && i % 4 == 0) cp_async_16(cells + i, values + i);
    if (error == 6 || error == 7) next = error == 6 ? cells[i + 1] : values[i + 1];
    if (error == 8) next = __shfl_xor_sync(ALL_LANES, next, 1) + cells[i ^ 1];
    if (error == 1 && i == 5) return;
    __syncthreads();
    values[i] = error > 5 ? next : cells[i];
}

// A product of 64 × 160 ones, and what goes wrong: 0 nothing, 1 the tensor cores are not shown what was copied, 2 a product without
// warpgroup_begin, 3 something is copied to where a product reads, 4 a thread ends before its products, 5 a warp wants another
// product, 6 a product reads behind shared memory.
KERNEL(probe_warpgroup, (128), float* sums, const f16* ones, int error) {
    take_turn();
    unsigned char* memory = shared_memory();
    constexpr int LEFT = 64 * 128, ALL = LEFT + 160 * 128;
    for (int i = threadIdx.x * 16; i < ALL; i += 128 * 16) cp_async_16(memory + i, ones);
    cp_async_commit();
    cp_async_wait<0>();
    if (error != 1) async_proxy_fence();
    __syncthreads();
    Sums<160> own = {};
    if (error != 2) warpgroup_begin();
    const unsigned char* left = memory + (error == 5 && threadIdx.x >= 96 ? 32 : 0);
    uint64_t right = matrix_at(memory + LEFT, Lines::Of128, error == 6 ? 2048 : 1024, 0);
    wgmma_k16<f16, false>(own, matrix_at(left, Lines::Of128, 1024, 0), right);
    warpgroup_commit();
    if (error == 3) {
        cp_async_16(memory + threadIdx.x * 16, ones, false);
        cp_async_commit();
        cp_async_wait<0>();
        async_proxy_fence();
    }
    if (error != 4) warpgroup_wait<0>();
    float sum = 0.0f;
    for (int i = 0; i < 80; ++i) sum += own[i / 4][i % 4];
    sums[threadIdx.x] = sum;
}

// Blocks of a cluster send each other 16 values each, twice: results[round][block][thread] is what thread % (16 · blocks) received.
// What goes wrong: 0 nothing, 1 nobody waits for the copies, 2 nobody begins the barrier, 3 a thread does not come to the cluster's
// barrier, 4 a copy from an address that is not aligned, 5 more is expected than comes, 6 the second round does not wait for the
// readers of the first, 7 a copy behind shared memory, 8 a thread comes to the barrier twice.
KERNEL(probe_cluster, (64), float* results, const float* values, int error) {
    float* cells = reinterpret_cast<float*>(shared_memory());
    Barrier* barrier = reinterpret_cast<Barrier*>(cells + 128);
    unsigned size = cluster_size(), rank = cluster_rank(), thread = threadIdx.x;
    if (thread == 0 && error != 2) begin_barrier(barrier, 1);
    if (error == 3 && rank == 1 && thread == 5) return take_turn();
    cluster_arrive_relaxed();
    cluster_wait();
    take_turn();
    for (unsigned round = 0; round < 2; ++round) {
        if (thread == 0) {
            expect(barrier, size * 64 + (error == 5 ? 16 : 0));
            const float* from = values + (round * size + rank) * 16 + (error == 4 ? 1 : 0);
            bulk_copy_to_all(error == 7 ? cells + 124 + 16 : cells + rank * 16, from, 64, barrier);
        }
        if (error != 1) wait_for(barrier, round);
        results[(round * gridDim.x + blockIdx.x) * 64 + thread] = cells[thread % (16 * size)];
        if (error != 6) cluster_arrive();
        if (error == 8 && thread == 40) cluster_arrive();
        if (error != 6) cluster_wait();
    }
}

// What the next block of the cluster has, read where it lies. What goes wrong: 0 nothing, 1 a block reads before the next has written,
// 2 a block ends while another may read there, 3 no block has the rank, 4 an address that is not aligned, 5 a read behind shared memory.
KERNEL(probe_ranks, (64), float* results, int error) {
    take_turn();
    float2* cells = reinterpret_cast<float2*>(shared_memory());
    unsigned thread = threadIdx.x, next = (cluster_rank() + 1) % cluster_size();
    cells[thread] = {static_cast<float>(blockIdx.x), static_cast<float>(thread)};
    if (error != 1) cluster_arrive(), cluster_wait();
    const float2* from = cells + (error == 5 ? thread + 1 : thread);
    if (error == 4) from = reinterpret_cast<const float2*>(&from->y);
    float2 read = load_from_rank(from, error == 3 ? cluster_size() : next);
    store_vector(results + (blockIdx.x * 64 + thread) * 2, read);
    if (error != 2) cluster_arrive(), cluster_wait();
}
