//! What a guest does, one scenario a function: tests/pod runs each in a guest of its own in namespaces, tests/vm runs them
//! all in one VM. A scenario finds a pod (`Guest::start_pod`), and leaves no container of its own behind.

pub mod life;

/// Every scenario, by module: `for_all!(then)` hands the list to the macro `then!`.
macro_rules! for_all {
    ($then:ident) => {
        $then! {
            life: a_container_has_its_streams_and_its_status;
        }
    };
}
pub(crate) use for_all;
