use proptest::prelude::*;

use super::*;

fn split(bytes: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
    (Header::decode(head), payload)
}

fn layout() -> impl Strategy<Value = Layout> {
    any::<[u64; 4]>().prop_map(|[guest_addr, size, user_addr, offset]| Layout { guest_addr, size, user_addr, offset })
}

fn region() -> impl Strategy<Value = Region<u16>> {
    (layout(), any::<u16>()).prop_map(|(layout, file)| Region { layout, file })
}

fn request() -> impl Strategy<Value = Request<u16>> {
    let fd = || (0..256u32, any::<Option<u16>>());
    let address =
        any::<[u64; 3]>().prop_map(|[descriptors, used, available]| RingAddress { descriptors, used, available });
    prop_oneof![
        Just(Request::GetFeatures),
        Just(Request::SetOwner),
        Just(Request::ResetOwner),
        Just(Request::GetProtocolFeatures),
        Just(Request::GetQueueNum),
        Just(Request::ResetDevice),
        Just(Request::GetMaxMemSlots),
        any::<u64>().prop_map(Request::SetFeatures),
        any::<u64>().prop_map(Request::SetProtocolFeatures),
        any::<(u32, u32)>().prop_map(|(ring, num)| Request::SetVringNum { ring, num }),
        any::<(u32, u32)>().prop_map(|(ring, base)| Request::SetVringBase { ring, base }),
        any::<u32>().prop_map(|ring| Request::GetVringBase { ring }),
        any::<(u32, bool)>().prop_map(|(ring, enable)| Request::SetVringEnable { ring, enable }),
        (any::<u32>(), address).prop_map(|(ring, address)| Request::SetVringAddr { ring, address }),
        fd().prop_map(|(ring, fd)| Request::SetVringKick { ring, fd }),
        fd().prop_map(|(ring, fd)| Request::SetVringCall { ring, fd }),
        fd().prop_map(|(ring, fd)| Request::SetVringErr { ring, fd }),
        proptest::collection::vec(region(), 0..=MAX_MEMORY_REGIONS).prop_map(Request::SetMemTable),
        region().prop_map(Request::AddMemReg),
        layout().prop_map(Request::RemMemReg),
    ]
}

proptest! {
    #[test]
    fn messages_round_trip(request in request(), need_reply: bool) {
        let (bytes, fds) = request.encode(need_reply);
        let (header, payload) = split(&bytes);
        prop_assert_eq!(header.payload_len().unwrap(), payload.len());
        prop_assert_eq!(header.need_reply(), need_reply);
        prop_assert!(fds.is_empty() || header.brings_fds(payload));
        let fds = fds.into_iter().copied().collect();
        prop_assert_eq!(Request::decode(&header, payload, fds).unwrap(), request);
    }

    #[test]
    fn message_of_the_wrong_length_is_refused(request in request(), change in 1..9usize) {
        let (bytes, fds) = request.encode(false);
        let (header, payload) = split(&bytes);
        let fds: Vec<u16> = fds.into_iter().copied().collect();
        let longer = [payload, &vec![0; change]].concat();
        prop_assert!(Request::decode(&header, &longer, fds.clone()).is_err());
        if !payload.is_empty() {
            let shorter = &payload[..payload.len() - change.min(payload.len())];
            prop_assert!(Request::decode(&header, shorter, fds).is_err());
        }
    }

    #[test]
    fn excess_descriptor_is_refused(request in request()) {
        let (bytes, fds) = request.encode(false);
        let (header, payload) = split(&bytes);
        let mut fds: Vec<u16> = fds.into_iter().copied().collect();
        fds.push(0);
        prop_assert!(Request::decode(&header, payload, fds).is_err());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(head: [u8; HEADER_LEN], payload: Vec<u8>, fds: Vec<u16>) {
        let header = Header::decode(&head);
        let _ = header.payload_len();
        let _ = Request::decode(&header, &payload, fds);
        let _ = Reply::decode(&header, &payload);
    }

    #[test]
    fn every_known_number_survives_any_payload(number in 0..50u32, payload: Vec<u8>, fds: Vec<u16>) {
        let header = Header { request: number, flags: VERSION, size: payload.len() as u32 };
        let _ = Request::decode(&header, &payload, fds);
    }
}

#[test]
fn invalid_headers_are_refused() {
    let refused = [0, 2, VERSION | REPLY, VERSION | 0x10, 3];
    for flags in refused {
        let header = Header { request: number::GET_FEATURES, flags, size: 0 };
        assert_eq!(header.payload_len(), Err(Malformed::Flags(flags)));
    }
    let huge = Header { request: number::SET_MEM_TABLE, flags: VERSION, size: u32::MAX };
    assert!(matches!(huge.payload_len(), Err(Malformed::Size { .. })));
}

#[test]
fn replies_round_trip() {
    for value in [ReplyValue::U64(7), ReplyValue::U64(u64::MAX)] {
        let reply = Reply { request: number::GET_FEATURES, value };
        let bytes = reply.encode();
        let (header, payload) = split(&bytes);
        assert_eq!(header.reply_len(number::GET_FEATURES), Ok(8));
        assert!(header.reply_len(number::SET_OWNER).is_err());
        assert_eq!(Reply::decode(&header, payload), Ok(reply));
    }
    let base = Reply { request: number::GET_VRING_BASE, value: ReplyValue::Vring { ring: 1, base: 65535 } };
    let bytes = base.encode();
    let (header, payload) = split(&bytes);
    assert_eq!(Reply::decode(&header, payload), Ok(base));
}
