use super::*;
use gogrid_api::Bytes;
use proptest::prelude::*;

const SECOND: Nanos = 1_000_000_000;

fn device(uuid: &str, backend: Backend) -> Device {
    Device {
        uuid: uuid.into(),
        name: "RTX".into(),
        backend,
        memory_total: Bytes(24 << 30).into(),
        memory_reserved: Bytes(0).into(),
        memory_foreign: Bytes(0).into(),
        memory_free: Bytes(24 << 30).into(),
        compute_capability: None,
        health: Health::Healthy,
        message: None,
        holder: None,
    }
}

/// GPU 0 and 1 whole, GPU 2 in two parts.
fn view() -> View {
    let places = [
        ("GPU-a", (0, None)),
        ("GPU-b", (1, None)),
        ("MIG-c", (2, Some(0))),
        ("MIG-d", (2, Some(1))),
    ];
    let mut view = View::of(
        places
            .iter()
            .map(|(uuid, _)| device(uuid, Backend::Cuda))
            .collect(),
    );
    view.places = places
        .iter()
        .map(|(uuid, place)| ((*uuid).to_owned(), *place))
        .collect();
    view
}

fn has(pod: &str, resource: &str, id: &str) -> Allocated {
    Allocated {
        namespace: "lab".into(),
        pod: pod.into(),
        resource: resource.into(),
        id: id.into(),
    }
}

fn resources() -> GpuResources {
    GpuResources::new(GPU_RESOURCES.map(str::to_owned).to_vec()).unwrap()
}

fn guest() -> Guest {
    Guest::new(true, Some(("lab".into(), "agent-1".into())), resources())
}

fn held_by(id: &str, resource: &str) -> Vec<String> {
    let mut guest = guest();
    guest.heard(Ok(vec![has("other", resource, id)]), 0);
    guest.holders(&view()).into_keys().collect()
}

#[test]
fn every_form_of_id_names_the_devices_it_means_and_one_that_cannot_be_read_may_mean_any() {
    let all = ["GPU-a", "GPU-b", "MIG-c", "MIG-d"];
    for (id, wanted) in [
        ("GPU-a", &all[..1]),
        ("GPU-b::3", &all[1..2]),
        ("MIG-d", &all[3..]),
        ("GPU-of-another-machine", &[]),
        ("1", &all[1..2]),
        ("2", &all[2..]),
        ("2:1", &all[3..]),
        ("7", &[]),
        ("nvidia0", &all[..1]),
        ("nvidia1/vgpu4", &all[1..2]),
        ("nvidia2/gi5", &all[2..]),
        ("gpu-1", &all[1..2]),
        ("gpu-2-mig-19-0-1", &all[2..]),
        ("card of honour", &all[..]),
        ("", &all[..]),
    ] {
        assert_eq!(held_by(id, "nvidia.com/gpu"), wanted, "{id:?}");
    }
}

#[test]
fn only_resources_that_are_gpus_count_and_a_star_stands_at_the_end_only() {
    for (resource, counts) in [
        ("nvidia.com/gpu", true),
        ("nvidia.com/gpu.shared", true),
        ("nvidia.com/mig-1g.5gb", true),
        ("gpu.nvidia.com", true),
        ("amd.com/gpu", false),
        ("gpu.nvidia.com.example", false),
        ("intel.com/sriov", false),
    ] {
        assert_eq!(!held_by("GPU-a", resource).is_empty(), counts, "{resource}");
    }
    for wrong in ["", "*", "nvidia.*/gpu", "a**"] {
        let error = GpuResources::new(vec![wrong.into()]).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{wrong:?}")) && error.contains("nvidia.com/gpu"),
            "{error}"
        );
    }
}

#[test]
fn what_the_agents_own_pod_holds_is_not_held_and_a_pod_of_that_name_elsewhere_is_another() {
    let mut guest = guest();
    guest.heard(Ok(vec![has("agent-1", "nvidia.com/gpu", "GPU-a")]), 0);
    assert!(guest.holders(&view()).is_empty());
    let elsewhere = Allocated {
        namespace: "other".into(),
        ..has("agent-1", "nvidia.com/gpu", "GPU-a")
    };
    guest.heard(Ok(vec![elsewhere]), 0);
    assert_eq!(guest.holders(&view())["GPU-a"].pod, "other/agent-1");
}

#[test]
fn a_held_device_says_by_whom_and_one_that_is_ill_keeps_its_own_reason() {
    let mut guest = guest();
    let two = ["GPU-a", "GPU-b"].map(|id| has("train", "nvidia.com/gpu", id));
    guest.heard(Ok(two.to_vec()), 0);
    let mut view = view();
    view.devices[1].health = Health::Unhealthy;
    view.devices[1].message = Some("it fell off the bus".into());
    let lent = guest.lent(&view);
    assert_eq!(lent[0].holder.as_deref(), Some("lab/train"));
    assert_eq!(lent[0].message.as_deref(), Some("pod lab/train holds it"));
    assert_eq!(lent[1].message.as_deref(), Some("it fell off the bus"));
    assert_eq!(lent[1].holder, None);
    assert_eq!(&lent[2..], &view.devices[2..]);
}

#[test]
fn before_the_kubelet_was_ever_heard_no_gpu_is_lent_and_the_cpu_is() {
    let mut view = view();
    view.devices.push(device("cpu", Backend::Cpu));
    let mut guest = guest();
    assert!(!guest.settled());
    for _ in 0..2 {
        let lent = guest.lent(&view);
        assert!(
            lent[..4].iter().all(|d| d.health == Health::Unhealthy),
            "{lent:?}"
        );
        assert_eq!(lent[4].health, Health::Healthy);
        guest.heard(Err("no such socket".into()), 0);
        assert!(guest.settled());
    }
    let (status, reason, message) = guest.condition(0);
    assert_eq!((status, reason), (ConditionStatus::False, "KubeletUnreadable"));
    assert!(
        message.contains("no such socket") && message.contains("agent.podResourcesDir"),
        "{message}"
    );
    guest.heard(Ok(vec![]), 1);
    assert_eq!(guest.lent(&view), view.devices);
}

#[test]
fn where_no_kubelet_is_asked_everything_is_lent_and_the_node_says_so() {
    let guest = Guest::new(false, None, resources());
    assert!(guest.settled());
    assert_eq!(guest.lent(&view()), view().devices);
    let (status, reason, message) = guest.condition(0);
    assert_eq!((status, reason), (ConditionStatus::Unknown, "KubeletNotAsked"));
    assert!(message.contains("agent.podResourcesDir"), "{message}");
}

#[test]
fn a_kubelet_that_falls_silent_is_believed_on_and_told_of_after_ten_seconds() {
    let mut guest = guest();
    assert!(guest.heard(Ok(vec![has("train", "nvidia.com/gpu", "GPU-a")]), 0));
    assert!(
        !guest.heard(Ok(vec![has("train", "nvidia.com/gpu", "GPU-a")]), 0),
        "nothing new"
    );
    assert_eq!(guest.condition(0).1, "KubeletAnswers");
    guest.heard(Err("refused".into()), SECOND);
    guest.heard(Err("refused".into()), 5 * SECOND);
    assert_eq!(guest.condition(11 * SECOND - 1).1, "KubeletAnswers");
    let (status, reason, message) = guest.condition(11 * SECOND);
    assert_eq!((status, reason), (ConditionStatus::Unknown, "KubeletSilent"));
    assert!(message.contains("refused"), "{message}");
    assert_eq!(guest.holders(&view()).len(), 1);
    assert!(guest.heard(Ok(vec![]), 12 * SECOND));
    assert_eq!(guest.condition(30 * SECOND).1, "KubeletAnswers");
}

#[test]
fn the_kubelet_is_asked_once_a_second_and_after_failures_never_less_often_than_every_four() {
    assert_eq!(
        [0, 1, 2, 3, 4, u32::MAX].map(|n| pause(n).0),
        [1_000, 1_000, 2_000, 4_000, 4_000, 4_000]
    );
}

#[test]
fn jobs_on_held_devices_must_go_and_no_others() {
    let mut guest = guest();
    guest.heard(Ok(vec![has("train", "nvidia.com/gpu", "GPU-a")]), 0);
    let holders = guest.holders(&view());
    let gone = claimed(
        &holders,
        [("one", "GPU-a"), ("two", "GPU-b"), ("three", "cpu"), ("four", "")],
    );
    assert_eq!(gone.keys().collect::<Vec<_>>(), ["one"]);
    let failure = &gone["one"];
    assert!(failure.retryable && failure.reason == DEVICE_CLAIMED);
    for word in ["GPU-a", "lab/train", "nvidia.com/gpu"] {
        assert!(failure.message.contains(word), "{}", failure.message);
    }
}

#[test]
fn a_device_is_unsaid_while_the_written_status_still_offers_it() {
    let mut guest = guest();
    guest.heard(Ok(vec![has("train", "nvidia.com/gpu", "GPU-a")]), 0);
    let view = view();
    let holders = guest.holders(&view);
    assert_eq!(unsaid(&holders, &view.devices), ["GPU-a"]);
    assert_eq!(unsaid(&holders, &guest.lent(&view)), Vec::<String>::new());
    assert_eq!(unsaid(&holders, &[]), Vec::<String>::new());
}

proptest! {
    #[test]
    fn whatever_ids_a_kubelet_lists_a_held_device_is_never_lent_and_its_jobs_always_leave(
        ids in prop::collection::vec(("[a-c]", "(GPU|MIG|gpu|nvidia|)-?[a-d0-3]?(::[0-9]|:[01]|/gi[0-9])?"), 0..6),
    ) {
        let mut guest = guest();
        guest.heard(Ok(ids.iter().map(|(pod, id)| has(pod, "nvidia.com/gpu", id)).collect()), 0);
        let view = view();
        let holders = guest.holders(&view);
        for device in guest.lent(&view) {
            let held = holders.contains_key(&device.uuid);
            prop_assert_eq!(held, device.health == Health::Unhealthy);
            prop_assert_eq!(held, device.holder.is_some());
            prop_assert_eq!(held, !claimed(&holders, [("job", device.uuid.as_str())]).is_empty());
            let by_uuid = ids.iter().any(|(_, id)| id == &device.uuid);
            prop_assert!(!by_uuid || held, "{} is listed and lent", device.uuid);
        }
    }
}
