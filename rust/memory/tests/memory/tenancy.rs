//! A place is given back once, and never under a user.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Barrier};
use virtio_memory::Tenancy;

#[test]
fn a_place_is_given_back_when_it_is_closed_without_users() {
    let (tenancy, shared) = (Tenancy::new(7), Arc::new(()));
    let alone = || Arc::strong_count(&shared) == 1;
    let user = tenancy.join(&shared);
    assert!(user.is_some() && !tenancy.closed());
    assert_eq!(tenancy.close(alone), None);
    assert!(tenancy.closed() && tenancy.join(&shared).is_none());
    drop(user);
    assert_eq!((tenancy.close(alone), tenancy.close(alone)), (Some(7), None));
}

#[test]
fn whoever_joins_while_it_closes_has_it_or_is_refused() {
    for _ in 0..3000 {
        let (tenancy, shared) = (Tenancy::new(()), Arc::new(()));
        let (given_back, both) = (AtomicBool::new(false), Barrier::new(3));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    both.wait();
                    let user = tenancy.join(&shared);
                    std::thread::yield_now();
                    assert!(user.is_none() || !given_back.load(SeqCst));
                    drop(user);
                });
            }
            both.wait();
            let place = tenancy.close(|| {
                let alone = Arc::strong_count(&shared) == 1;
                std::thread::yield_now(); // as long as it counts, nobody joins
                alone
            });
            given_back.store(place.is_some(), SeqCst);
        });
    }
}
